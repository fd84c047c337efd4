"""The memory of one pool in one epoch: its blocks, tables, prefixes and grants, and the commands on them.

Every command either does all it says or raises and changes nothing. A pool whose epoch ends is dropped as a whole.

Equal content. A block that fills with content that is already published under the same identity stays in its table,
unpublished: the executor holds the block's id in its own table, so swapping it here alone would make the two disagree.
If nobody uses the published one, the live block takes its place. Else the published one is offered to the table, and
held for it: the gateway has the executor's table name it, says so behind the steps in flight
(`memsvc.core.replacement`), and the copy falls back to the blank blocks; at the latest when its sequence ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
import dataclasses

import numpy as np
import numpy.typing as npt

from memsvc.core import ceilings, fork, pending, retention, sliding
from memsvc.core.admission import AdmitContext, new_record
from memsvc.core.content import NO_EXTRAS, FreshContent, PrefixMatch, Publication
from memsvc.core.events import BlocksStored, CacheEvent
from memsvc.core.evictions import EVICTIONS_REMEMBERED, EvictionMemory
from memsvc.core.forecast import AdmissionForecast
from memsvc.core.free_order import BlockIds
from memsvc.core.journal import Journal
from memsvc.core.lease import Grants
from memsvc.core.pool import BlockPool, BlockState
from memsvc.core.prefix import PrefixIndex
from memsvc.core.residency import ResidencySampler
from memsvc.core.table import Slots, TableColumns, TableRecord, TableState
from memsvc.core.tenancy import NOBODY, Tenancy, TenantUse
from memsvc.core.writer import JournalWriter
from quire import hashing, media
from quire.errors import CacheInUseError, PromptTooLongError
from quire.memory import Admission, AdmitRequest, CloseReason, Fork, ForkRequest, PoolSpec
from quire.units import div_ceil
from quire.window import hit_block_count

RETAINED_SHARE = 0.25
_TOKEN_BYTES = 4


@dataclasses.dataclass(slots=True)
class PoolStatistics:
    """Counters since the epoch began; tokens of admitted requests, each request counted once."""

    query_token_count: int = 0
    hit_token_count: int = 0
    preemption_count: int = 0
    swap_count: int = 0
    """Of these, by swap to host memory."""

    def count(self, request: AdmitRequest, token_count: int, cached: int) -> None:
        """Counts an admission that looked for `token_count` tokens and found `cached`, if it is the request's first."""
        if not (request.resumed or request.skip_cache_read):
            self.query_token_count += token_count
            self.hit_token_count += cached


class PoolMemory:
    """One pool in one epoch.

    Args:
        spec: geometry.
        epoch: epoch of every table and grant.
        chain: computes identities.
        cache_events: keep what is published and forgotten, for `take_cache_events`.
        forecast: refuse admissions for which there will be no room soon.
        retained_share: of the pool, what a tenant may retain if its quota does not say.
        residency_every: follow the life of every n-th block that is taken; 0 for none.
    """

    def __init__(
        self,
        spec: PoolSpec,
        epoch: int,
        chain: Callable[[bytes, bytes | memoryview, int], list[bytes]] = hashing.chain,
        *,
        cache_events: bool = False,
        forecast: bool = False,
        retained_share: float = RETAINED_SHARE,
        residency_every: int = 0,
    ) -> None:
        self.spec = spec
        self._retained_share = retained_share
        self.epoch = epoch
        self.pool = BlockPool(spec.block_count)
        if residency_every:
            self.pool.residencies = ResidencySampler(spec.block_count, residency_every)
        self.prefix = PrefixIndex(spec.block_count, spec.block_size, chain, self.pool.tenant)
        self.prefix.events = [] if cache_events else None
        self.tables = TableColumns()
        self.window = spec.window
        self.evictions = EvictionMemory(min(EVICTIONS_REMEMBERED, spec.block_count // 2))
        self.grants: dict[int, Grants] = {}
        self.statistics = PoolStatistics()
        self.forecast = AdmissionForecast(spec) if forecast else None
        self.shared = fork.SharedBlocks()
        self.pending = pending.PendingPrefixes()
        self.merge_offers: list[tuple[int, int, int]] = []
        self._writer = JournalWriter(self)

    @property
    def tenancy(self) -> Tenancy | None:
        """Who holds and keeps what; None while no tenant has a quota and no block is retained."""
        return self.pool.tenancy

    def begin_tenancy(self) -> Tenancy:
        """Returns the tenancy of the pool, which counts from now on."""
        if self.pool.tenancy is not None:
            return self.pool.tenancy
        retained = int(self._retained_share * self.pool.usable_block_count)
        tenancy = Tenancy(self.spec.block_count, self.pool.since, retained)
        owned = np.flatnonzero((self.pool.refs > 0) | (self.pool.state == BlockState.CACHED))
        numbers = np.zeros(self.spec.block_count, np.int64)
        numbers[owned] = [tenancy.number(tag) for tag in self.pool.tenant[owned].tolist()]
        self.pool.begin_tenancy(tenancy, numbers)
        return tenancy

    def tenant_use(self, tag: int) -> TenantUse:
        """Returns what a tenant has of this pool."""
        if self.tenancy is not None:
            return self.tenancy.use(tag)
        mine = self.pool.tenant == tag
        held = int(np.count_nonzero(mine & (self.pool.refs > 0)))
        return TenantUse(held, int(np.count_nonzero(mine & (self.pool.state == BlockState.CACHED))), 0, 0)

    def admit(self, request: AdmitRequest, context: AdmitContext, now: float) -> Admission:
        """Opens a table; see `quire.memory.Memory.admit`."""
        size = self.spec.block_size
        token_count = len(request.token_ids) // _TOKEN_BYTES
        block_count = div_ceil(token_count, size)
        self._require_possible(token_count, min(block_count, self.spec.sequence_block_limit))
        gate = self.gate(context.tenant_tag)
        extras = media.block_extras(request.media, size) if request.media else NO_EXTRAS
        match = self._match(request, context.root, extras)
        found = match.found
        block_count = sliding.entry_count(self.spec, block_count, len(match.blocks) - len(found))
        new_count = block_count - len(match.blocks)
        source, cached = match.partial_block, len(match.blocks) * size + match.partial_token_count
        pending_count = pending.look_up(self, request, match, cached) if self.pending and not extras else 0
        revived = self._cached_among(found)
        available = self.pool.available_block_count - self._takable(found)
        room: int | None = None
        if gate is not None:
            gate.require_possible(request, new_count + len(found), found)
            available -= gate.tenancy.sheltered(gate.number)
            room = gate.room(request, self.tables, context.tenant_tag, block_count)
            gate.require_room(request, new_count + revived, room)
        if source:
            kept = available - self._takable(np.array([source]))
            beside = new_count + revived + self._cached_among(np.array([source]))
            if new_count > kept or (room is not None and beside > room):
                # The copy's source would take the last block: compute those tokens rather than refuse.
                source, cached = 0, len(match.blocks) * size
            else:
                available = kept
        self.pool.require(new_count, available)
        if self.forecast is not None:
            self.forecast.require_room(request, self.tables, new_count, available)
        keep = retention.asked_for(
            request.retention_priority, request.retention_ttl_seconds, session=bool(request.session_id)
        )
        if keep:
            self.begin_tenancy()
        counter = self.tables.reserve()
        held = np.append(found, source) if source else found
        fresh = self._obtain(held, new_count, context.tenant_tag, now)
        overflow = self._store_prompt(request.token_ids, fresh, len(match.blocks) * size)
        blocks = np.concatenate((match.blocks, fresh)) if len(match.blocks) else fresh
        record = new_record(request, context, counter, now)
        record.blocks, record.parent = array("q", blocks.tobytes()), match.identity
        record.cached_token_count, record.copy_source = cached, source
        record.retention, record.overflow, record.extras = keep, overflow, extras
        slot = self._open(record, token_count, len(match.blocks), len(match.blocks) - len(found))
        self.tables.limit[slot] = token_count + request.max_new_tokens
        if self.forecast is not None:
            self.forecast.opened(request, self.tables, slot, cached)
        self.statistics.count(request, token_count, cached)
        copies = [(source, record.blocks[len(match.blocks)])] if source else []
        pending.note(self, slot, record)
        return Admission(self.epoch, counter, blocks.tolist(), cached, copies, pending_count)

    def fork(self, gateway: int, request: ForkRequest, ordinal: int, now: float) -> Fork:
        """Opens tables that share the beginning of another; see `memsvc.core.fork.fork`."""
        return fork.fork(self, gateway, request, ordinal, now)

    def leave_shared(self, record: TableRecord) -> None:
        """Notes that a table names its shared open block no more; who holds it alone now writes in place."""
        last = self.shared.leave(record.table)
        if last:
            self.write_in_place(self.tables.slot(last))

    def write_in_place(self, slot: int) -> None:
        """Lets a table write into its open block, and moves tokens there that waited for that."""
        tables, record = self.tables, self.tables.record(slot)
        index, record.shared_index = record.shared_index, -1
        tokens, record.overflow = array("I", record.overflow), []
        self._writer.append_tokens(slot, int(tables.tokens[slot]) - len(tokens), memoryview(tokens))
        self.refresh_open_blocks(slot)
        if not record.copy_source:
            self.pool.filled[record.blocks[index]] = int(tables.written[slot]) % self.spec.block_size

    def refresh_open_blocks(self, slot: int) -> None:
        """Notes anew in which blocks a table's next token and next write go."""
        tables = self.tables
        tables.token_block[slot] = self._writer.token_block(slot, int(tables.tokens[slot]))
        tables.write_block[slot] = self._writer.open_block(slot, int(tables.written[slot]))

    def lease(self, gateway: int, granted_total: int, now: float) -> list[int]:
        """Brings the blocks ever granted to `gateway` up to `granted_total`; returns the new ones, maybe too few."""
        grants = self.grants_of(gateway)
        count = min(granted_total - grants.granted_total, self.pool.available_block_count)
        taker = NOBODY
        if self.tenancy is not None and count > 0:
            count, taker = ceilings.unsheltered(self.pool, self.tenancy, grants, count)
        if count <= 0:
            return []
        blocks, evicted = self.pool.take(count, now, lessee=gateway, taker=taker)
        if len(evicted):
            self.forget_evicted(evicted, now)
        grants.granted_total += count
        grants.leased += count
        granted: list[int] = blocks.tolist()
        return granted

    def take_cache_events(self) -> list[CacheEvent]:
        """Returns what was published and forgotten since the last call, oldest first."""
        if not self.prefix.events:
            return []
        events, self.prefix.events = self.prefix.events, []
        return events

    def published(self, *, with_tokens: bool = True) -> BlocksStored:
        """Returns everything that can be matched as full blocks."""
        blocks = np.flatnonzero(self.prefix.published == Publication.FULL)
        return self.prefix.describe(blocks, with_tokens=with_tokens)

    def locate(self, request: AdmitRequest, root: bytes) -> int:
        """Returns how many leading tokens an admission would find; changes nothing."""
        extras = media.block_extras(request.media, self.spec.block_size) if request.media else NO_EXTRAS
        counted = self.prefix.collision_count
        match = self._match(request, root, extras, learn=False)
        self.prefix.collision_count = counted
        return len(match.blocks) * self.spec.block_size + match.partial_token_count

    def journal(self, gateway: int, journal: Journal, now: float) -> None:
        """Applies a journal, whole or not at all; see `JournalWriter.apply`."""
        self._writer.apply(gateway, journal, now)
        if self.pending:
            pending.follow(self, journal.tables)

    def grants_of(self, gateway: int) -> Grants:
        """Returns what `gateway` holds here."""
        grants = self.grants.get(gateway)
        if grants is None:
            grants = self.grants[gateway] = Grants()
        return grants

    def close(self, slot: int, reason: CloseReason, now: float) -> None:
        """Drops a table's references. What is committed stays cached, the tail ahead of the head in eviction order."""
        record = self.tables.record(slot)
        if record.publishes and reason != CloseReason.FAILED:
            self._publish_tail(slot, record)
        if record.shared_index >= 0:
            self.leave_shared(record)
        self.pending.leave(record.table)
        blocks = record.held_block_ids()[::-1]
        reusable = self.settle(blocks)
        if record.retention and self.tenancy is not None and reason != CloseReason.FAILED:
            # The beginning first: without it the rest cannot be matched.
            number = self.tenancy.known(record.tenant_tag)
            self.tenancy.retain(blocks[reusable][::-1], record.retention, number)
        self.pool.drop(blocks, reusable, now, awaited=reason == CloseReason.PREEMPTED)
        if self.forecast is not None:
            self.forecast.closed(record, reason, self.tables, slot)
        self.tables.close(slot)
        self.grants[record.gateway].tables.discard(record.table)
        if reason.comes_back:
            self.statistics.preemption_count += 1
            self.statistics.swap_count += reason == CloseReason.SWAPPED

    def settle(self, blocks: BlockIds) -> npt.NDArray[np.bool_]:
        """Returns which of `blocks`, that a table lets go of, can be matched; equal ones make way for each other."""
        published = self.prefix.published[blocks]
        duplicates = blocks[published == Publication.DUPLICATE]
        if len(duplicates):
            for block in duplicates.tolist():
                self.prefix.republish(block)
            published = self.prefix.published[blocks]
            self.prefix.forget(blocks[published == Publication.DUPLICATE])
        reusable: npt.NDArray[np.bool_] = (published == Publication.FULL) | (published == Publication.PARTIAL)
        return reusable

    def begin_closing(self, gateway: int, now: float) -> bool:
        """Makes everything that `gateway` holds wait for a fence; false if it holds nothing."""
        grants = self.grants.get(gateway)
        if grants is None:
            return False
        if not grants.tables and not grants.leased:
            del self.grants[gateway]
            return False
        for table in sorted(grants.tables):
            record = self.tables.record(self.tables.slot(table))
            record.state = TableState.CLOSING
            self.pending.leave(table)
            self.pool.begin_closing(record.held_block_ids(), now)
        self.pool.freeze_leases(gateway, now)
        return True

    def end_closing(self, gateway: int, now: float) -> None:
        """Frees what waited for the fence of `gateway`. Committed blocks stay cached."""
        grants = self.grants.get(gateway)
        if grants is None:
            return
        for table in sorted(grants.tables):
            slot = self.tables.slot(table)
            self.pool.end_closing(self.tables.record(slot).held_block_ids())
            self.close(slot, CloseReason.CANCELLED, now)
        self.pool.put_back(np.flatnonzero(self.pool.lessee == gateway), now)
        del self.grants[gateway]

    def reset(self, now: float) -> int:
        """Forgets everything that can be matched and returns how many blocks held it.

        Raises:
            CacheInUseError: a table, open or closing, holds blocks; nothing was changed.
        """
        if self.tables.open_count:
            used, pending = self.pool.count(BlockState.USED), self.pool.count(BlockState.PENDING)
            raise CacheInUseError(
                f"{self.tables.open_count} sequences hold {used} blocks, and {pending} wait for a fence; force the "
                "reset to have the sequences queued and computed again",
                metadata={
                    "sequence_count": self.tables.open_count,
                    "used_block_count": used,
                    "pending_free_block_count": pending,
                },
            )
        blocks = self.pool.clear_cached(now)
        self.prefix.clear()
        if self.pool.residencies is not None:
            self.pool.residencies.clear()
        return len(blocks)

    def publish(self, fresh: FreshContent, slots: Callable[[], Slots], now: float) -> None:
        """Makes full blocks of the tables `slots` matchable, each content once; see the module's text."""
        succeeded: dict[int, int] = {}
        for block, found in self.prefix.publish_full(fresh):
            # Of several equal ones at once the first takes the place of a cached one, and is what the others equal.
            other = succeeded.get(found, found)
            if self.pool.state[other] == BlockState.CACHED:
                if self.tenancy is not None:
                    self.tenancy.succeed(other, block)
                self.prefix.forget(np.array([other]))
                self.pool.discard_cached(np.array([other]), now)
                self.prefix.republish(block)
                succeeded[found] = block
            else:
                self._offer(block, other, slots(), now)

    def _offer(self, block: int, kept: int, slots: Slots, now: float) -> None:
        """Offers the published block to the table with an equal one; it is held until that names it, or ends."""
        index = int(self.prefix.index[block])
        for slot in slots[slots >= 0].tolist():
            record = self.tables.record(slot)
            if index < len(record.blocks) and record.blocks[index] == block:
                record.merges[index] = kept
                self.pool.share(np.array([kept]), now)
                self.merge_offers.append((record.table, index, kept))
                return

    def release_copy_source(self, slot: int, now: float) -> None:
        """Drops the reference on the source of a copy that has run."""
        record = self.tables.record(slot)
        source = np.array([record.copy_source])
        record.copy_source = 0
        self.tables.written_floor[slot] = 0
        self.pool.drop(source, self.prefix.published[source] != Publication.NONE, now)

    def _require_possible(self, token_count: int, block_count: int) -> None:
        """Raises PromptTooLongError if the tokens can never fit."""
        if token_count > self.spec.max_model_len:
            message = f"token_ids: {token_count} tokens, the longest sequence here is {self.spec.max_model_len} tokens"
        elif block_count > self.pool.usable_block_count:
            message = (
                f"token_ids: {token_count} tokens need {block_count} blocks, the whole pool has "
                f"{self.pool.usable_block_count}"
            )
        else:
            return
        raise PromptTooLongError(
            message,
            field="token_ids",
            metadata={
                "token_count": token_count,
                "max_model_len": self.spec.max_model_len,
                "needed_block_count": block_count,
                "usable_block_count": self.pool.usable_block_count,
            },
        )

    def gate(self, tag: int) -> ceilings.TenantGate | None:
        """Returns who decides about a tenant's tables, None if nothing does."""
        return (
            ceilings.TenantGate(self.tenancy, self.tenancy.known(tag), self.spec) if self.tenancy is not None else None
        )

    def _obtain(self, held: BlockIds, count: int, tag: int, now: float) -> BlockIds:
        """Takes a reference on `held` and returns `count` fresh blocks of a tenant; there is room for both."""
        tenancy, number = self.tenancy, NOBODY
        if tenancy is not None:
            # What has expired is not retained any more when it is found again.
            tenancy.expire(now)
            number = tenancy.number(tag)
        if len(held):
            self.pool.share(held, now)
        fresh, evicted = self.pool.take(count, now, taker=number)
        if len(evicted):
            self.forget_evicted(evicted, now)
        self.pool.tenant[fresh] = tag
        if tenancy is not None:
            tenancy.entered(fresh, number)
        return fresh

    def forget_evicted(self, evicted: BlockIds, now: float) -> None:
        """Makes evicted blocks match nothing, and remembers what they were for a while."""
        self.evictions.note(self.prefix.identities[:, 0][evicted], now)
        self.prefix.forget(evicted)

    def _match(
        self, request: AdmitRequest, root: bytes, extras: Mapping[int, bytes], *, learn: bool = True
    ) -> PrefixMatch:
        if request.skip_cache_read:
            return PrefixMatch(np.zeros(0, np.int64), root, 0, 0)
        if self.window:
            needed = hit_block_count(self.window, self.spec.block_size)
            return self.prefix.match_window(root, request.token_ids, needed, extras)
        return self.prefix.match(root, request.token_ids, extras, learn=learn)

    def _cached_among(self, blocks: BlockIds) -> int:
        """Returns how many of `blocks` nobody uses: sharing them makes that many unavailable."""
        return int(np.count_nonzero(self.pool.state[blocks] == BlockState.CACHED)) if len(blocks) else 0

    def _takable(self, blocks: BlockIds) -> int:
        """Returns how many of `blocks` could be taken for something else: all that are cached but those pinned."""
        count = self._cached_among(blocks)
        if count and self.tenancy is not None:
            pinned = self.tenancy.retention[blocks] == retention.PINNED
            count -= self._cached_among(blocks[pinned])
        return count

    def _store_prompt(self, token_ids: bytes, fresh: BlockIds, start: int) -> list[int]:
        """Notes the tokens from `start` on as the content of the fresh blocks; returns those that do not fit."""
        size = self.spec.block_size
        words = np.frombuffer(token_ids, "<u4")[start:]
        overflow: list[int] = words[len(fresh) * size :].tolist()
        words = words[: len(fresh) * size]
        full = len(words) // size
        if full:
            self.prefix.tokens[fresh[:full]] = words[: full * size].reshape(full, size)
        rest = len(words) - full * size
        if rest:
            self.prefix.tokens[fresh[full], :rest] = words[full * size :]
        return overflow

    def _open(self, record: TableRecord, token_count: int, shared_count: int, released_count: int) -> int:
        """Enters a table whose first `shared_count` blocks are committed, and null up to `released_count`.

        Returns its slot.
        """
        size = self.spec.block_size
        index, offset = divmod(token_count, size)
        tables = self.tables
        slot = tables.open(record)
        self.grants_of(record.gateway).tables.add(record.table)
        tables.tokens[slot] = token_count
        tables.written[slot] = shared_count * size
        tables.written_floor[slot] = record.cached_token_count if record.copy_source else 0
        tables.committed[slot] = shared_count
        tables.token_block[slot] = record.blocks[index] if offset and index < len(record.blocks) else 0
        tables.released[slot] = released_count
        tables.write_block[slot] = record.blocks[shared_count]
        tables.found[slot] = shared_count
        return slot

    def _publish_tail(self, slot: int, record: TableRecord) -> None:
        """Makes the written head of the last, partly filled block matchable by copy."""
        if record.shared_index >= 0 or record.copy_source:
            # Others share it, or the copy that brings it may not have run.
            return
        index, count = divmod(int(self.tables.written[slot]), self.spec.block_size)
        # A head is matched by its tokens alone: what covers more is found only as a full block.
        plain = index not in record.extras
        if count and plain and self.tables.committed[slot] == index and self.pool.refs[record.blocks[index]] == 1:
            self.prefix.publish_partial(record.blocks[index], record.parent, count)
