"""The whole state of a core: copied, as bytes, and as a digest.

Every field of every class of the core is state, but for those named in `DERIVED`: other views of the same memory,
scratch, what is fixed from outside, and what waits to be told to others. A class or a kind of value that is not known
here is an error, so that no field is forgotten in silence.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Collection, Mapping
import dataclasses
import enum
import hashlib
import operator
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from memsvc.core import invariants
from memsvc.core.codec import Codec, Node, fields_of, state_of, values_of
from memsvc.core.digest_chains import DigestChains
from memsvc.core.eviction import EvictionLanes, Lane
from memsvc.core.forecast import AdmissionForecast, OutputForecast, RecomputeControl
from memsvc.core.fork import SharedBlocks
from memsvc.core.free_order import BlankOrder, CachedOrder
from memsvc.core.journal import JournalColumns, PackedJournal
from memsvc.core.lease import Gateway, Grants
from memsvc.core.memory import MemoryCore
from memsvc.core.pending import PendingPrefixes
from memsvc.core.pool import BlockPool
from memsvc.core.pool_memory import PoolMemory, PoolStatistics
from memsvc.core.prefix import PrefixIndex
from memsvc.core.prefix_views import PrefixSelector
from memsvc.core.registered import RegisteredPool
from memsvc.core.roots import RecordedRoots
from memsvc.core.table import TableColumns, TableRecord, TableState
from memsvc.core.tenancy import Tenancy, TenantQuota
from memsvc.core.validation import PoolRegistration
from quire.errors import CorruptionError, InvariantError
from quire.media import MediaItem
from quire.memory import AdmitRequest, CloseReason, ForkRequest, PoolSpec

VERSION: Final = 1
DIGEST_BYTES: Final = 16

DERIVED: Final[Mapping[type, frozenset[str]]] = {
    # Fixed from outside or derived from it; events are what nobody was told yet, not what is the case.
    MemoryCore: frozenset(
        {"_cache_events", "_chain", "_events", "_residency_every", "_root", "_tenant_secret", "log", "roots"}
    ),
    RegisteredPool: frozenset(),
    Gateway: frozenset(),
    PoolMemory: frozenset({"_writer", "evictions"}),
    PoolStatistics: frozenset(),
    Grants: frozenset(),
    BlockPool: frozenset({"native", "residencies"}),
    SharedBlocks: frozenset(),
    PendingPrefixes: frozenset(),
    BlankOrder: frozenset(),
    CachedOrder: frozenset(),
    # Views of the columns, and the pool's tenants, which are in the pool.
    PrefixIndex: frozenset(
        {"_chain", "_identity", "_parent", "_published", "_tenants", "_token_bytes", "events", "native", "token_words"}
    ),
    DigestChains: frozenset({"_heads", "_next", "_scratch"}),
    TableColumns: frozenset({"_native", "_scratch"}),
    TableRecord: frozenset(),
    # The pool's own column.
    EvictionLanes: frozenset({"since"}),
    Lane: frozenset(),
    Tenancy: frozenset(),
    AdmissionForecast: frozenset(),
    OutputForecast: frozenset(),
    RecomputeControl: frozenset(),
}
"""Classes with a state, and their fields that are none."""

VALUES: Final = (
    AdmitRequest,
    CloseReason,
    ForkRequest,
    JournalColumns,
    MediaItem,
    PackedJournal,
    PoolRegistration,
    PoolSpec,
    PrefixSelector,
    TableState,
    TenantQuota,
)
"""Classes of immutable objects in the state and in commands."""

_GROWING: Final = frozenset({EvictionLanes, TableColumns, Tenancy})
"""Classes whose columns may have any length."""

_ATOMS: Final = frozenset({int, float, str, bytes, bool, type(None), MappingProxyType, *VALUES})
_PLAIN: Final = frozenset(kind for kind in VALUES if not issubclass(kind, enum.Enum))
_column_bytes: Final[Callable[[JournalColumns], tuple[int, ...]]] = operator.attrgetter(
    *(f"{name}.nbytes" for name in fields_of(JournalColumns))
)
_packed_columns: Final[Callable[[PackedJournal], tuple[bytes, ...]]] = operator.attrgetter(*fields_of(PackedJournal))
_COLLECTIONS: Final = frozenset({list, tuple, set, deque})
_RECORD_BYTES: Final = 512
_MISSING: Final = object()
_MISSHAPEN: Final = (AssertionError, AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)

CODEC: Final = Codec(VALUES, DERIVED)


def clone(core: MemoryCore, spare: MemoryCore | None = None) -> MemoryCore:
    """Returns a core of its own in the same state. It has no log and keeps no events.

    Args:
        core: what is copied.
        spare: a copy that nobody needs any more; its memory is used where it fits. Fresh memory costs several times the
            copying.
    """
    spares = [pool.memory for pool in spare.pools.values()] if spare is not None else []
    return _Copier(MemoryCore(core._tenant_secret, chain=core._chain), spares).fill(core)  # noqa: SLF001 - no state


def encode(core: MemoryCore) -> bytes:
    """Returns the state as bytes; the tenants' secret is not in it. See `memsvc.core.codec` for the format."""
    return CODEC.encode((VERSION, core))


def decode(data: bytes | memoryview) -> MemoryCore:
    """Returns a core in the state that was encoded.

    It knows no tenant's secret: an admission needs the roots that the log took down.

    Raises:
        CorruptionError: these are not the bytes of a state that can be.
    """
    found = CODEC.decode(data)
    if not isinstance(found, tuple) or len(found) != 2 or found[0] != VERSION:  # noqa: PLR2004 - a pair
        raise CorruptionError(f"the snapshot is not of version {VERSION}")
    if not isinstance(found[1], Node) or found[1].cls is not MemoryCore:
        raise CorruptionError("the snapshot does not hold a memory core")
    try:
        core = _Copier(MemoryCore(bytes(32))).fill(found[1])
        core.roots = RecordedRoots()
        invariants.check(core)
    except InvariantError as error:
        raise CorruptionError(f"the snapshot holds a state that cannot be: {error.message}") from error
    except _MISSHAPEN as error:
        raise CorruptionError(f"the snapshot holds a value of a kind that cannot be: {error}") from error
    return core


def digest(core: MemoryCore) -> bytes:
    """Returns 16 bytes that are equal for equal states, and only for them."""
    return hashlib.blake2b(encode(core), digest_size=DIGEST_BYTES).digest()


def weight(value: Any) -> int:
    """Returns about how many bytes a value or a state takes."""
    kind = type(value)
    if kind is JournalColumns:
        return 64 + sum(_column_bytes(value))
    if kind is PackedJournal:
        return 64 + sum(map(len, _packed_columns(value)))
    if kind is TableRecord:
        return _RECORD_BYTES + 8 * len(value.blocks)
    if kind is np.ndarray or kind is memoryview:
        return int(value.nbytes)
    if kind is bytes or kind is bytearray or kind is str:
        return len(value)
    if kind is dict or kind is MappingProxyType:
        return sum(64 + weight(key) + weight(item) for key, item in value.items())
    if kind in _COLLECTIONS:
        return sum([8 + weight(item) for item in value if item is not None])
    if kind in DERIVED:
        return 64 + sum(weight(item) for item in state_of(value, DERIVED[kind]).values())
    if kind in _PLAIN:
        return 64 + sum([weight(item) for item in values_of(value)])
    return 8


class _Copier:
    """Copies a state, of a core or as it was decoded, into a core."""

    def __init__(self, core: MemoryCore, spares: Collection[PoolMemory] = ()) -> None:
        self._core = core
        self._spares = list(spares)
        self._made: dict[int, object] = {}

    def fill(self, source: MemoryCore | Node) -> MemoryCore:
        """Returns the core with the state of `source`."""
        self._fill(source, self._core)
        return self._core

    def _fill(self, source: object, target: object) -> None:
        self._made[id(source)] = target
        cls = type(target)
        fields = state_of(source, DERIVED[cls])
        if fields.keys() != state_of(target, DERIVED[cls]).keys():
            raise CorruptionError(f"the fields of {cls.__name__} are not those that this version knows")
        for name, value in fields.items():
            before = getattr(target, name)
            after = self._copy(value, before, is_growing=cls in _GROWING)
            if after is not before:
                setattr(target, name, after)
        if isinstance(target, TableColumns):
            target.fit_scratch()
        if isinstance(target, BlockPool) and target.tenancy is not None:
            target.tenancy.follow(target.since)

    def _copy(self, value: Any, before: Any = _MISSING, *, is_growing: bool = False) -> Any:
        """Returns a copy of a value, in the memory of `before` if that is a column: others may look at it too."""
        kind = type(value)
        if kind in _ATOMS:
            if before is not _MISSING and before is not None and value is not None and type(before) is not kind:
                raise TypeError(f"{kind.__name__} instead of {type(before).__name__}")
            return value
        if kind is np.ndarray:
            if before is _MISSING or (is_growing and before.dtype == value.dtype):
                return value.copy()
            if before.shape != value.shape or before.dtype != value.dtype:
                raise ValueError(f"a column {value.shape} of {value.dtype} instead of {before.shape}, {before.dtype}")
            before[...] = value
            return before
        if isinstance(before, memoryview | bytearray):
            if len(before) != len(value):
                raise ValueError(f"a column of {len(value)} instead of {len(before)}")
            before[:] = value
            return before
        if kind is dict:
            return {self._copy(key): self._copy(item) for key, item in value.items()}
        if kind is list:
            return [item if type(item) in _ATOMS else self._copy(item) for item in value]
        if kind is deque:
            return deque((self._copy(item) for item in value), value.maxlen)
        if kind is tuple or kind is set:
            return kind(self._copy(item) for item in value)
        if kind is array:
            return value[:]
        return self._copy_object(value, before)

    def _copy_object(self, value: Any, before: Any) -> Any:
        made = self._made.get(id(value))
        if made is not None:
            return made
        cls = value.cls if isinstance(value, Node) else type(value)
        if cls not in DERIVED:
            raise TypeError(f"{cls.__qualname__} is not known to snapshots")
        if type(before) is cls:
            made = before
        elif cls is PoolMemory:
            made = self._new_memory(state_of(value, DERIVED[cls]))
        elif cls is Tenancy:
            made = Tenancy(0, np.zeros(0), 0)
        elif dataclasses.is_dataclass(cls):
            items = values_of(value)
            made = cls(*[item if type(item) in _ATOMS else self._copy(item) for item in items])
            self._made[id(value)] = made
            return made
        else:
            raise TypeError(f"{cls.__name__} is in a place where none was made")
        self._fill(value, made)
        return made

    def _new_memory(self, fields: Mapping[str, Any]) -> PoolMemory:
        """Returns the memory of a pool of the right size, whose columns are still to be filled."""
        columns = fields["pool"]
        refs = state_of(columns, DERIVED[BlockPool])["refs"]
        spec = fields["spec"]
        # The column is there: a forged size would take memory that nothing has shown to be needed.
        if not isinstance(spec, PoolSpec) or len(refs) != spec.block_count:
            raise ValueError("the columns do not fit the pool's size")
        forecast = fields["forecast"] is not None
        for at, spare in enumerate(self._spares):
            if spare.spec == spec and (spare.forecast is not None) == forecast and _is_alike(spare.pool, columns):
                return self._spares.pop(at)
        return PoolMemory(spec, fields["epoch"], self._core._chain, forecast=forecast)  # noqa: SLF001 - as above


def _is_alike(spare: BlockPool, columns: Any) -> bool:
    """Returns whether the parts of a pool are of the classes that they are to be filled from."""
    fields = state_of(columns, DERIVED[BlockPool])
    kinds = [value.cls if isinstance(value, Node) else type(value) for value in fields.values()]
    return kinds == [type(getattr(spare, name)) for name in fields]
