"""The memory core against a slow, obvious model, under random commands.

The model is a device: every block remembers which tokens were written to it, for which tenant. Whatever the core says
is cached must be there to read through the block table, whatever happened before.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
import numpy as np
import pytest

from memsvc.core import invariants
from memsvc.core.lease import FenceRequired, MergeOffered
from memsvc.core.log import CommandLog, Entry
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.core.prefix_views import PrefixSelector
from memsvc.core.replay import decode_entry, encode_entry, replay, replay_segments
from memsvc.core.snapshot import clone, decode, digest, encode
from memsvc.core.tenancy import NO_QUOTA
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from quire.columns import pack
from quire.errors import (
    BlockPoolExhaustedError,
    CacheInUseError,
    InvalidRequestError,
    PrefixNotFoundError,
    PromptTooLongError,
    StaleEpochError,
    TenantCeilingError,
)
from quire.memory import AdmitRequest, CloseReason, JournalEntry, PoolSpec
from tests.properties.memory_model import (
    PIECES,
    POOL,
    SIZE,
    TENANTS,
    USABLE,
    ModelGateway,
    ModelTable,
    contents_of,
    media_of,
    tokens_of,
)
from tests.properties.native_pair import computed_by
from tests.properties.sharing_rules import SharingRules


class MemoryMachine(SharingRules):
    """Random commands of two gateways, deaths included."""

    HAS_QUOTAS: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.core = MemoryCore(b"secret of this test", lease_ttl=float("inf"), residency_every=2)
        # Small enough for a long run to drop its beginning.
        self.log = CommandLog(self.core, 1 << 17)
        self.first = clone(self.core)
        self.whole: list[Entry] | None = []
        self.device: dict[int, tuple[str, list[int | None]]] = {}
        self.gateways: list[ModelGateway] = []
        self.fences: list[tuple[FenceRequired, ModelGateway]] = []
        self.names = itertools.count()
        self.epoch = 0
        self.now = 0.0

    @initialize()
    def start(self) -> None:
        """Registers the pool and connects two gateways."""
        self.register()
        for name in ("one", "two"):
            self.gateways.append(self.connect(name))

    def register(self) -> None:
        """Registers a new incarnation of the executor."""
        self.epoch += 5
        spec = PoolSpec(USABLE + 1, SIZE, 1, "model", "float32", 10 * SIZE, self.WINDOW)
        self.core.register_pool(PoolRegistration(POOL, self.epoch, "h:1", spec), self.epoch, self.now)

    def connect(self, name: str) -> ModelGateway:
        """Connects a gateway."""
        return ModelGateway(self.core.connect_gateway(name, next(self.names) + 1, self.now), name)

    @property
    def pool(self) -> Any:
        """The blocks of the core."""
        return self.core.pool(POOL).memory.pool

    def tell(self, gateway: ModelGateway, **fields: Any) -> None:
        """Sends a journal."""
        self.now += 1.0
        self.core.journal(gateway.number, POOL, self.epoch, packed(JournalEntry(POOL, self.epoch, **fields)), self.now)
        self.hear(gateway)

    def hear(self, gateway: ModelGateway) -> None:
        """Takes what the core has to say to gateways: fences go to the executor, offers to their tables."""
        for event in self.core.take_events():
            if isinstance(event, FenceRequired):
                self.fences.append((event, gateway))
            elif isinstance(event, MergeOffered):
                assert event.gateway_number == gateway.number
                for number, index, block in event.rows:
                    # Closed in the same journal: the offer ended with it.
                    if number in gateway.tables:
                        gateway.tables[number].offered[index] = block

    def read(self, table: ModelTable, count: int) -> list[int | None]:
        """Returns what the device holds at the first `count` positions of a table."""
        found: list[int | None] = []
        for index in range(-(-count // SIZE)):
            if not table.blocks[index]:
                found.extend([None] * SIZE)
                continue
            block = table.blocks[index]
            source = {target: source for source, target in table.copies}.get(block, block)
            tenant, content = self.device.get(source, ("", [None] * SIZE))
            assert tenant == table.tenant, "a block of another tenant"
            found.extend(content)
        return found[:count]

    def check_readable(self, table: ModelTable, count: int) -> None:
        """Fails if a query at position `count` or later reads something else than was written."""
        first = max(0, count - self.WINDOW + 1) if self.WINDOW else 0
        assert self.read(table, count)[first:] == table.contents[first:count]

    def release(self, table: ModelTable, confirmed: int) -> None:
        """Forgets the blocks none of whose positions is read any more once `confirmed` tokens are."""
        table.confirmed = max(table.confirmed, confirmed)
        for index in range(len(table.blocks)):
            positions = range(index * SIZE, (index + 1) * SIZE)
            if self.WINDOW and all(table.confirmed - position >= self.WINDOW for position in positions):
                table.blocks[index] = 0
                table.offered.pop(index, None)

    def store(self, table: ModelTable, start: int, end: int) -> None:
        """Writes tokens [start, end) of a table to the device, the copies first."""
        for source, target in table.copies:
            self.device[target] = (table.tenant, list(self.device[source][1]))
        table.copies = []
        for position in range(start, end):
            block = table.blocks[position // SIZE]
            if self.device.get(block, ("", []))[0] != table.tenant or block not in self.device or position % SIZE == 0:
                self.device[block] = (table.tenant, [None] * SIZE)
            self.device[block][1][position % SIZE] = table.contents[position]

    @rule(which=st.integers(0, 1), pieces=PIECES, tenant=TENANTS, read=st.booleans(), write=st.booleans())
    def admit(self, which: int, pieces: list[tuple[int, int]], tenant: str, read: bool, write: bool) -> None:
        """Opens a table; what it says is cached must be readable."""
        gateway, tokens, contents = self.gateways[which], tokens_of(pieces), contents_of(pieces)
        self.now += 1.0
        request = AdmitRequest(
            POOL, self.epoch, f"r{next(self.names)}", 0, pack(tokens), tenant=tenant,
            skip_cache_read=not read, skip_cache_write=not write, media=media_of(pieces),
            **self.wishes(needed=-(-len(tokens) // SIZE)),
        )  # fmt: skip
        available = self.pool.available_block_count
        needed = -(-len(tokens) // SIZE)
        try:
            admission = self.core.admit(gateway.number, request, self.now)
        except PromptTooLongError:
            too_many = needed > USABLE and not self.WINDOW
            assert too_many or len(tokens) > 10 * SIZE or self.impossible(tenant, needed)
            return
        except (BlockPoolExhaustedError, TenantCeilingError):
            assert needed > 0
            assert available == self.pool.available_block_count
            return
        assert admission.cached_token_count < len(tokens)
        assert read or admission.cached_token_count == 0
        table = ModelTable(
            number=admission.table,
            tenant=tenant,
            tokens=tokens,
            contents=contents,
            written=admission.cached_token_count,
            blocks=admission.block_ids,
            copies=admission.copies,
            publishes=write,
            confirmed=admission.cached_token_count // SIZE * SIZE,
        )
        told = list(table.blocks)
        self.release(table, table.confirmed)
        assert table.blocks == told
        self.check_readable(table, admission.cached_token_count)
        if self.WINDOW:
            assert len(told) - told.count(0) <= (self.WINDOW - 2) // SIZE + 2
            assert admission.cached_token_count // SIZE < len(told) <= needed
        else:
            assert len(told) == needed
        gateway.tables[table.number] = table
        # Tells what it was told: the copy has not run by this, and its source must stay.
        cached = admission.cached_token_count
        self.tell(gateway, tables=[table.number], token_starts=[len(tokens)], token_counts=[0], written_counts=[cached])

    def wishes(self, needed: int) -> dict[str, Any]:
        """Returns further fields of an admission of so many blocks."""
        return {}

    def impossible(self, tenant: str, needed: int) -> bool:
        """Whether a tenant can never have so many blocks, though the pool has them."""
        return False

    def leasable(self, gateway: ModelGateway) -> int:
        """Returns how many blocks a gateway may lease now."""
        available: int = self.pool.available_block_count
        return available

    def choose(self, data: st.DataObject, which: int) -> tuple[ModelGateway, ModelTable] | None:
        """Returns one of the open tables of a gateway."""
        gateway = self.gateways[which]
        if not gateway.tables:
            return None
        return gateway, gateway.tables[data.draw(st.sampled_from(sorted(gateway.tables)))]

    @rule(which=st.integers(0, 1), data=st.data())
    def write(self, which: int, data: st.DataObject) -> None:
        """Has some known tokens written."""
        chosen = self.choose(data, which)
        if chosen is None:
            return
        gateway, table = chosen
        limit = min(len(table.tokens), len(table.blocks) * SIZE)
        if table.written >= limit:
            return
        replaced = self.own_open_block(gateway, table)
        if replaced is None:
            return
        if replaced and data.draw(st.booleans()):
            self.tell(gateway, replaced=replaced)
            replaced = []
        self.confirm(gateway, table, data.draw(st.integers(table.written + 1, limit)), replaced=replaced)

    def confirm(self, gateway: ModelGateway, table: ModelTable, written: int, **fields: Any) -> None:
        """Has a table written up to a position, and tells so."""
        self.store(table, table.written, written)
        table.written = written
        self.tell(
            gateway,
            tables=[table.number],
            token_starts=[len(table.tokens)],
            token_counts=[0],
            written_counts=[written],
            **fields,
        )
        self.release(table, written)

    @rule(which=st.integers(0, 1), data=st.data(), count=st.integers(1, 20))
    def extend(self, which: int, data: st.DataObject, count: int) -> None:
        """Adds tokens, growing from the lease as far as it goes."""
        chosen = self.choose(data, which)
        if chosen is not None:
            self.extend_by(*chosen, count)

    def extend_by(self, gateway: ModelGateway, table: ModelTable, count: int) -> None:
        """Adds tokens to a table; see `extend`."""
        count = min(count, 10 * SIZE - len(table.tokens))
        appended: list[int] = []
        while gateway.leased and len(table.blocks) * SIZE < len(table.tokens) + count:
            block = gateway.leased.pop(0)
            appended += [table.number, len(table.blocks), block]
            table.blocks.append(block)
        count = min(count, len(table.blocks) * SIZE + 1 - len(table.tokens))
        count = max(count, 0)
        start = len(table.tokens)
        table.tokens += [9000 + (start + offset) % 7 for offset in range(count)]
        table.contents += table.tokens[start:]
        self.tell(
            gateway,
            tables=[table.number],
            token_starts=[start],
            token_counts=[count],
            token_ids=table.tokens[start:],
            written_counts=[table.written],
            appended=appended,
        )

    # Where quotas are a part of the model, they begin to count by themselves, and this would take them away.
    @precondition(lambda self: not self.HAS_QUOTAS)
    @rule(tenant=TENANTS)
    def count(self, tenant: str) -> None:
        """Has tenants' blocks counted from now on, which limits nobody: all invariants of the counts are checked."""
        self.core.set_quota(POOL, tenant, NO_QUOTA)

    @rule(which=st.integers(0, 1), pieces=PIECES, tenant=TENANTS)
    def run_to_the_end(self, which: int, pieces: list[tuple[int, int]], tenant: str) -> None:
        """Opens a table, has all of it written, and closes it: this is what fills the cache."""
        gateway = self.gateways[which]
        before = set(gateway.tables)
        self.admit(which=which, pieces=pieces, tenant=tenant, read=True, write=True)
        for number in set(gateway.tables) - before:
            table = gateway.tables[number]
            count = min(len(table.tokens), len(table.blocks) * SIZE)
            self.store(table, table.written, count)
            known = len(table.tokens)
            self.tell(gateway, tables=[number], token_starts=[known], token_counts=[0], written_counts=[count])
            table.written = count
            self.release(table, count)
            self.holds()
            del gateway.tables[number]
            self.tell(gateway, closed=[number], close_reasons=[CloseReason.FINISHED])

    @rule(which=st.integers(0, 1), data=st.data(), reason=st.sampled_from(list(CloseReason)))
    def close(self, which: int, data: st.DataObject, reason: CloseReason) -> None:
        """Closes a table, twice."""
        chosen = self.choose(data, which)
        if chosen is None:
            return
        gateway, table = chosen
        for _ in range(2):
            self.tell(gateway, closed=[table.number], close_reasons=[reason])
        del gateway.tables[table.number]

    @rule(which=st.integers(0, 1), count=st.integers(1, 6))
    def lease(self, which: int, count: int) -> None:
        """Leases blocks, and asks again for the same total."""
        gateway = self.gateways[which]
        expected = min(count, self.leasable(gateway))
        blocks = self.core.lease(gateway.number, POOL, self.epoch, gateway.granted + count, self.now)
        assert len(blocks) == expected
        gateway.granted += len(blocks)
        gateway.leased += blocks
        assert self.core.lease(gateway.number, POOL, self.epoch, gateway.granted, self.now) == []

    @rule(which=st.integers(0, 1), count=st.integers(0, 4))
    def give_back(self, which: int, count: int) -> None:
        """Returns leased blocks."""
        gateway = self.gateways[which]
        returned, gateway.leased = gateway.leased[:count], gateway.leased[count:]
        self.tell(gateway, returned=returned)

    @rule(which=st.integers(0, 1), data=st.data())
    def garbage(self, which: int, data: st.DataObject) -> None:
        """Sends a journal of random numbers: it is refused, or it says nothing new."""
        numbers = st.sampled_from([0, 1, 2, 3, 7, 16, USABLE, USABLE + 1, 2**31, 2**32 - 1])
        column = st.lists(numbers, max_size=3)
        fields = {
            name: data.draw(column)
            for name in ("tables", "token_starts", "token_counts", "written_counts", "token_ids", "closed", "returned")
        }
        if len(set(fields["returned"]) & set(self.gateways[which].leased)) or fields["closed"]:
            fields["returned"], fields["closed"] = [], []
        if fields["tables"]:
            fields["tables"] = [2**31 + table for table in fields["tables"]]
        before = self.pool.free_order()
        try:
            self.tell(self.gateways[which], **fields)
        except (InvalidRequestError, StaleEpochError):
            assert self.pool.free_order() == before
        else:
            assert not fields["tables"]

    @rule(which=st.integers(0, 1))
    def die(self, which: int) -> None:
        """A gateway dies and comes back; what it held waits for the fence."""
        dead = self.gateways[which]
        self.gateways[which] = self.connect(dead.name)
        self.hear(dead)
        if not self.fences or self.fences[-1][1] is not dead:
            assert not dead.tables and not dead.leased

    @precondition(lambda self: self.fences)
    @rule()
    def fence(self) -> None:
        """An executor answers the oldest fence."""
        event, _ = self.fences.pop(0)
        self.core.fenced(event.pool_id, event.epoch, event.gateway_number, self.now)

    @rule()
    @precondition(lambda self: self.now > 40)
    def restart_executor(self) -> None:
        """The executor restarts: everything of the old epoch is void."""
        self.register()
        self.device.clear()
        self.fences.clear()
        self.now = 0.0
        for gateway in self.gateways:
            gateway.tables.clear()
            gateway.leased.clear()
            gateway.granted = 0
        with pytest.raises(StaleEpochError):
            self.core.lease(self.gateways[0].number, POOL, self.epoch - 5, 1, self.now)
        assert self.pool.count(BlockState.FREE) == USABLE

    @rule(force=st.booleans())
    def reset_cache(self, force: bool) -> None:
        """Clears the cache: refused while a table holds blocks, unless forced, which voids every table."""
        held = [*self.gateways, *(gateway for _, gateway in self.fences)]
        busy = any(gateway.tables for gateway in held)
        epoch = self.epoch + 5 if force else 0
        if busy and not force:
            order = self.pool.free_order()
            with pytest.raises(CacheInUseError):
                self.core.reset_cache(POOL, self.now)
            assert self.pool.free_order() == order
            return
        leased = self.pool.count(BlockState.LEASED)
        self.core.reset_cache(POOL, self.now, epoch)
        assert self.pool.count(BlockState.CACHED) == 0
        if not busy:
            assert self.pool.count(BlockState.LEASED) == leased
            return
        self.epoch = epoch
        self.device.clear()
        self.fences.clear()
        for gateway in self.gateways:
            gateway.tables.clear()
            gateway.leased.clear()
            gateway.granted = 0
        assert self.pool.count(BlockState.FREE) == USABLE

    @rule(pieces=PIECES, tenant=TENANTS)
    def evict_prefix(self, pieces: list[tuple[int, int]], tenant: str) -> None:
        """An operator has a text forgotten: what nobody uses of it is gone, and nothing else."""
        tokens = tokens_of(pieces)
        selector, cached = PrefixSelector(pack(tokens), tenant), self.pool.count(BlockState.CACHED)
        self.core.explain_prefix(POOL, selector)
        try:
            count, kept = self.core.evict_prefix(POOL, selector, self.now)
        except PrefixNotFoundError:
            count, kept = 0, 0
        assert self.pool.count(BlockState.CACHED) == cached - count
        if not kept:
            request = AdmitRequest(POOL, self.epoch, "r", 0, pack([*tokens, 0]), tenant=tenant)
            # At most the head of a block is left: nobody begins with a whole one.
            assert len(tokens) >= 10 * SIZE or self.core.locate(request) < SIZE

    @rule()
    def rotate(self) -> None:
        """Begins a new part of the log in the middle of anything."""
        before = self.log.segments[-1]
        self.keep_entries()
        assert self.log.rotate()
        base = self.log.segments[-1].base
        assert digest(base) == digest(self.core) == digest(replay_segments([before]))

    def keep_entries(self) -> None:
        """Keeps what was taken down since the last time, as it is written to a file."""
        if self.whole is None:
            return
        last = self.log.segments[-1]
        start = self.log.end - len(last.lines)
        if len(self.whole) < start:
            # The log began a new segment by itself: what it dropped cannot be had any more.
            self.whole = None
            return
        self.whole += [decode_entry(encode_entry(entry)) for entry in last.entries(len(self.whole) - start)]

    def teardown(self) -> None:
        """The state is the fold of the commands: from the beginning, from a snapshot and its tail, and from bytes."""
        self.keep_entries()
        expected = digest(self.core)
        assert digest(replay_segments(self.log.segments)) == expected
        assert digest(replay_segments(self.log.segments[-1:])) == expected
        elsewhere = decode(encode(self.log.segments[-1].base))
        assert digest(replay(elsewhere, self.log.segments[-1].entries())) == expected
        if self.whole is not None:
            # In Python, whatever computed it: a report is replayed where no compiler was, too.
            with computed_by(None):
                assert digest(replay(self.first, self.whole)) == expected

    @invariant()
    def holds(self) -> None:
        """Everything adds up, and the model agrees."""
        if not self.gateways:
            return
        invariants.check(self.core)
        live = [table for gateway in self.gateways for table in gateway.tables.values()]
        dead = [table for _, gateway in self.fences for table in gateway.tables.values()]
        used = set(np.flatnonzero(self.pool.state == BlockState.USED))
        assert used == {block for table in live for block in self.named(table)}
        leased = {block for gateway in self.gateways for block in gateway.leased}
        assert set(np.flatnonzero(self.pool.state == BlockState.LEASED)) == leased
        pending = {block for table in dead for block in self.named(table)}
        pending |= {block for _, gateway in self.fences for block in gateway.leased}
        assert set(np.flatnonzero(self.pool.state == BlockState.PENDING)) == pending - used
        for table in live:
            self.check_readable(table, table.written)


MemoryMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 14)
class TestMemoryMachine(MemoryMachine.TestCase):  # type: ignore[misc,name-defined]
    """Runs the machine: a failure here is a wrong token, a leak or another tenant's text."""
