"""Two memory cores that hear the same commands, one with the accelerator and one in Python, and what they differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import random
from typing import Any

import numpy as np

from memsvc.core.lease import Grants
from memsvc.core.memory import MemoryCore, PoolRegistration
from memsvc.core.pool_memory import PoolMemory
from memsvc.local import packed
from quire import native
from quire.columns import pack
from quire.errors import QuireError
from quire.media import MediaItem
from quire.memory import AdmitRequest, CloseReason, JournalEntry, PoolSpec

POOL = "pool"
SIZE = 16
USABLE = 36
MAX_MODEL_LEN = 160
# Not state of the core, or the same state under another name.
_LEFT_OUT = {"native", "_native", "_scratch", "_chain", "_tenants", "_token_bytes", "token_words"}


@contextlib.contextmanager
def computed_by(accelerator: native.Accelerator | None) -> Iterator[None]:
    """Has everything computed by `accelerator`, or in Python."""
    before, native.accelerator = native.accelerator, accelerator
    try:
        yield
    finally:
        native.accelerator = before


def state_of(thing: Any) -> Any:
    """Returns everything that a part of the core remembers, in values that can be compared."""
    if isinstance(thing, np.ndarray):
        return thing.dtype.str, thing.tobytes()
    if isinstance(thing, memoryview | bytearray):
        return bytes(thing)
    if isinstance(thing, Mapping):
        return dict(thing)
    if isinstance(thing, list):
        return [state_of(item) for item in thing]
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: state_of(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
    names = getattr(type(thing), "__slots__", ())
    if names and type(thing).__module__.startswith("memsvc.core"):
        return {name: state_of(getattr(thing, name)) for name in names if name not in _LEFT_OUT}
    return thing


def memory_state(memory: PoolMemory) -> dict[str, Any]:
    """Returns everything that one pool remembers."""
    parts = {"pool": memory.pool, "prefix": memory.prefix, "tables": memory.tables}
    grants = {number: dataclasses.asdict(one) for number, one in memory.grants.items()}
    return {name: state_of(part) for name, part in parts.items()} | {"grants": grants}


def differences(path: str, one: Any, other: Any) -> Iterator[str]:
    """Yields where two states differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from differences(f"{path}.{name}", one[name], other[name])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(f"{path}[{at}]", *pair)
    elif one != other:
        yield f"{path}: {one!r} and {other!r}"


class Pair:
    """The two cores.

    Args:
        seed: of the commands.
        accelerator: what the first core computes with.
    """

    def __init__(self, seed: int, accelerator: native.Accelerator) -> None:
        self.random = random.Random(seed)
        self.accelerator = accelerator
        self.now = 1.0
        spec = PoolSpec(USABLE + 1, SIZE, 1, "model", "float32", MAX_MODEL_LEN)
        self.cores: list[tuple[MemoryCore, native.Accelerator | None]] = []
        for one in (accelerator, None):
            with computed_by(one):
                core = MemoryCore(bytes(32), cache_events=True, residency_every=2)
                core.register_pool(PoolRegistration(POOL, 1, "h:1", spec), 1, self.now)
            self.cores.append((core, one))
        self._tenants = ["", *self._neighbours(spec)]
        self.gateways: list[int] = []
        self.incarnation = 0
        self.connect()
        self.connect()

    def _neighbours(self, spec: PoolSpec) -> Iterator[str]:
        """Yields tenants whose first blocks are looked for in the same place as those of the tenant without a name."""
        core, mask = self.cores[1][0], len(self.memory.prefix._by_parent.columns[0]) - 1
        places = {name: core._root(spec, "", name, "")[0][0] & mask for name in ("", *map(str, range(200)))}
        yield from [name for name, place in places.items() if name and place == places[""]][:2]

    @property
    def memory(self) -> PoolMemory:
        """The pool of the core without an accelerator."""
        return self.cores[1][0].pools[POOL].memory

    def both(self, command: Callable[[MemoryCore], Any]) -> Any:
        """Gives a command to both and returns what came of it.

        Raises:
            AssertionError: the two differ, in what they say or in what they are.
        """
        said: list[Any] = []
        for core, accelerator in self.cores:
            with computed_by(accelerator):
                try:
                    said.append(("done", command(core)))
                except QuireError as error:
                    said.append((type(error).__name__, error.reason, error.message))
        states = [
            {
                "memory": memory_state(core.pools[POOL].memory),
                "events": core.take_events(),
                "cache_events": state_of(core.take_cache_events(POOL)),
                "said": answer,
            }
            for (core, _), answer in zip(self.cores, said, strict=True)
        ]
        found = list(differences("", *states))
        if found:
            raise AssertionError("\n".join(found[:10]))
        return said[0][1] if said[0][0] == "done" else None

    def connect(self) -> None:
        """Connects a gateway."""
        self.incarnation += 1
        number = self.both(lambda core: core.connect_gateway(f"g{self.incarnation}", self.incarnation, self.now))
        self.gateways.append(number)

    def step(self) -> None:
        """Gives a random command."""
        self.now += 0.01
        commands: list[tuple[int, Callable[[], None]]] = [
            (10, self.admit),
            (6, self.lease),
            (30, self.journal),
            (1, self.replace_gateway),
            (1, self.evict),
        ]
        weights = [weight for weight, _ in commands]
        self.random.choices([command for _, command in commands], weights)[0]()

    def admit(self) -> None:
        """Opens a table for a prompt made of few pieces."""
        pieces = [[piece * 1000 + at for at in range(16)] for piece in range(3)]
        tokens = [token for _ in range(self.random.randint(1, 4)) for token in self.random.choice(pieces)]
        tokens = tokens[: self.random.choice([len(tokens), self.random.randint(1, len(tokens))])]
        request = AdmitRequest(
            *(POOL, 1, "r", 0, pack(tokens), self.random.choice(self._tenants)),
            skip_cache_read=self.random.random() < 0.1,
            skip_cache_write=self.random.random() < 0.1,
            media=(MediaItem(0, 1, bytes(16)),) if self.random.random() < 0.1 else (),
        )
        gateway = self.random.choice(self.gateways)
        self.both(lambda core: core.admit(gateway, request, self.now))

    def lease(self) -> None:
        """Leases a few blocks."""
        gateway = self.random.choice(self.gateways)
        total = self._grants(gateway).granted_total + self.random.choice([1, 3, 6, 12])
        self.both(lambda core: core.lease(gateway, POOL, 1, total, self.now))

    def evict(self) -> None:
        """Leases all that is available, which forgets what was cached, and returns it."""
        gateway = self.random.choice(self.gateways)
        total = self._grants(gateway).granted_total + USABLE
        blocks = self.both(lambda core: core.lease(gateway, POOL, 1, total, self.now))
        entry = JournalEntry(POOL, 1, returned=blocks)
        self.both(lambda core: core.journal(gateway, POOL, 1, packed(entry), self.now))

    def replace_gateway(self) -> None:
        """Ends a gateway, fences it, and connects another."""
        gateway = self.gateways.pop(0)
        self.both(lambda core: core.disconnect_gateway(gateway, self.now))
        self.connect()
        self.both(lambda core: core.fenced(POOL, 1, gateway, self.now))

    def journal(self) -> None:
        """Journals growth, rows, closed tables and returned blocks; most of it right, some of it wrong."""
        gateway = self.random.choice(self.gateways)
        entry = JournalEntry(POOL, 1)
        owner, lessee = gateway, gateway
        if self.random.random() < 0.06:
            owner = self.random.choice(self.gateways)
        if self.random.random() < 0.06:
            lessee = self.random.choice(self.gateways)
        leased = np.flatnonzero(self.memory.pool.lessee == lessee).tolist()
        tables = sorted(self._grants(owner).tables)
        for table in self.random.sample(tables, min(len(tables), self.random.randint(1, 4))):
            self._advance(entry, table, leased)
        for table in tables:
            if self.random.random() < 0.12:
                entry.closed.append(table)
                entry.close_reasons.append(self.random.choice(list(CloseReason)))
        while leased and self.random.random() < 0.1:
            entry.returned.append(leased.pop())
        if self.random.random() < 0.3:
            self._spoil(entry)
        self.both(lambda core: core.journal(gateway, POOL, 1, packed(entry), self.now))

    def _grants(self, gateway: int) -> Grants:
        """Returns what a gateway holds, without making a note of it."""
        return self.memory.grants.get(gateway, Grants())

    def _advance(self, entry: JournalEntry, table: int, leased: list[int]) -> None:
        """Adds growth and a row for one table."""
        chance = self.random
        tables = self.memory.tables
        slot = tables.slot(table)
        length, known = int(tables.length[slot]), int(tables.tokens[slot])
        for _ in range(chance.choice([0, 0, 1, 1, 2])):
            if leased:
                entry.appended += (table, length, leased.pop(chance.randrange(len(leased))))
                length += 1
        room = max(0, length * SIZE - known)
        count = chance.choice([0, 1, min(1, room), min(16, room), room, min(17, room)])
        end = min(known + count, MAX_MODEL_LEN)
        count = max(0, end - known)
        written = int(tables.written[slot])
        entry.tables.append(table)
        entry.token_starts.append(known)
        entry.token_counts.append(count)
        # Few different tokens: blocks come to be equal.
        entry.token_ids.extend(chance.choice([5, 5, 5, 6]) for _ in range(count))
        entry.written_counts.append(chance.choice([written, known + count, chance.randint(written, known + count)]))

    def _spoil(self, entry: JournalEntry) -> None:
        """Makes one thing of the entry wrong, or at least unusual."""
        chance = self.random
        faults = [self._spoil_value]
        if entry.tables:
            faults += [self._repeat_row, self._rename_table, self._contradict, self._unwrite, self._write_ahead]
        if entry.appended:
            faults.append(self._leave_gap)
        chance.choice(faults)(entry)

    def _repeat_row(self, entry: JournalEntry) -> None:
        at, again = self.random.randrange(len(entry.tables)), self.random.random() < 0.5
        count = entry.token_counts[at]
        entry.tables.append(entry.tables[at])
        entry.token_starts.append(entry.token_starts[at] + (0 if again else count))
        entry.token_counts.append(count if again else 0)
        entry.written_counts.append(entry.written_counts[at])
        entry.token_ids.extend([5] * count if again else [])

    def _rename_table(self, entry: JournalEntry) -> None:
        """The place is that of another table."""
        entry.tables[-1] = max(0, entry.tables[-1] + self.random.choice([64, -64]))

    def _contradict(self, entry: JournalEntry) -> None:
        """The last known token is given again, and is another one."""
        at = len(entry.tables) - 1
        entry.token_starts[at] = max(0, entry.token_starts[at] - 1)

    def _unwrite(self, entry: JournalEntry) -> None:
        slot = self.memory.tables.slot(entry.tables[-1])
        entry.written_counts[-1] = max(0, int(self.memory.tables.written[slot]) - self.random.choice([1, 17]))

    def _write_ahead(self, entry: JournalEntry) -> None:
        entry.written_counts[-1] = entry.token_starts[-1] + entry.token_counts[-1] + 1

    def _leave_gap(self, entry: JournalEntry) -> None:
        entry.appended[-2] += 1

    def _spoil_value(self, entry: JournalEntry) -> None:
        chance = self.random
        columns: list[Any] = [entry.tables, entry.token_starts, entry.token_counts, entry.written_counts]
        columns += [entry.appended, entry.returned, entry.closed]
        column = chance.choice([column for column in columns if column] or [entry.returned])
        if not column:
            column.append(0)
        at = chance.randrange(len(column))
        column[at] = chance.choice([0, max(0, column[at] - 1), column[at] + 1, USABLE, USABLE + 1, 2**31, 2**32 - 1])
