"""What a gateway knows of the memory service: one protocol, implemented in this process and over gRPC.

    Admission is a transaction. Growth is a lease. Free and commit are a journal.

`memsvc.local.LocalMemory` is the core itself, `gateway.clients.memory.RemoteMemory` the same behind a stream; both pass
the same tests. All calls come from one asyncio event loop.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, MutableSequence
import dataclasses
import enum
from typing import Protocol

from quire.media import MediaItem
from quire.units import div_ceil
from quire.window import window_block_count

EPOCH_SHIFT = 32


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSpec:
    """Geometry of a pool; see `quire.memsvc.v1.PoolSpec`."""

    block_count: int
    block_size: int
    bytes_per_block: int
    model_id: str
    kv_dtype: str
    max_model_len: int
    sliding_window: int = 0
    """Positions that a query reads, its own included, in every layer; 0 for all."""

    @property
    def usable_block_count(self) -> int:
        """Blocks that can be granted: all but the null block."""
        return self.block_count - 1

    @property
    def window(self) -> int:
        """The sliding window, 0 where none is ever left."""
        return self.sliding_window if self.sliding_window < self.max_model_len else 0

    @property
    def sequence_block_limit(self) -> int:
        """Most blocks that a sequence needs at one time."""
        longest = div_ceil(self.max_model_len, self.block_size)
        return min(longest, window_block_count(self.window, self.block_size)) if self.window else longest

    @property
    def sequence_token_limit(self) -> int:
        """Longest sequence that the pool can hold by itself, in tokens."""
        if self.window and self.sequence_block_limit <= self.usable_block_count:
            return self.max_model_len
        return self.usable_block_count * self.block_size


@dataclasses.dataclass(frozen=True, slots=True)
class PoolInfo:
    """A pool as last heard of."""

    pool_id: str
    epoch: int
    ready: bool
    spec: PoolSpec
    executor_address: str
    executor_incarnation: int


class CloseReason(enum.IntEnum):
    """Why a table was closed; the numbers are those of the wire."""

    FINISHED = 1
    CANCELLED = 2
    PREEMPTED = 3
    FAILED = 4
    SWAPPED = 5
    """Preempted, and what was in its blocks is kept in host memory."""

    @property
    def comes_back(self) -> bool:
        """Whether the sequence will be admitted again."""
        return self in (CloseReason.PREEMPTED, CloseReason.SWAPPED)


@dataclasses.dataclass(frozen=True, slots=True)
class AdmitRequest:
    """Asks for a table; see `quire.memsvc.v1.AdmitRequest`."""

    pool_id: str
    epoch: int
    request_id: str
    sample_index: int
    token_ids: bytes
    """Tokens known so far, packed little-endian u32; at least one."""
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    skip_cache_read: bool = False
    skip_cache_write: bool = False
    max_new_tokens: int = 0
    resumed: bool = False
    wait_for_prefix: bool = False
    """Refuse with PrefixPendingError while another table is about to publish more of this prompt than there is."""
    min_new_tokens: int = 0
    """How many more tokens the sequence will have at least: what `min_tokens` or `ignore_eos` ask for."""
    media: tuple[MediaItem, ...] = ()
    """What placeholder tokens stand for, in order."""
    session_id: str = ""
    retention_priority: int = 0
    retention_ttl_seconds: int = 0
    swapped_token_count: int = 0
    """Leading tokens whose keys and values are in host memory and will be moved into the blocks, not computed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """An open table."""

    epoch: int
    table: int
    """Counter of the table within the epoch."""
    block_ids: list[int]
    """One for every block_size tokens, 0 for those outside the window; where it slides the last ones may be missing."""
    cached_token_count: int
    """Leading tokens that need not be computed; less than the tokens given."""
    copies: list[tuple[int, int]]
    """(source, destination): blocks that the executor copies before the first write."""
    pending_token_count: int = 0
    """Tokens behind the cached ones that another open table is about to publish; computed twice, as it was not waited
    for them."""


@dataclasses.dataclass(frozen=True, slots=True)
class ForkRequest:
    """Asks for tables that share the beginning of another; see `quire.memsvc.v1.ForkRequest`."""

    pool_id: str
    epoch: int
    table: int
    """Counter of the source, an open table of this gateway."""
    count: int
    """How many tables to open, 1 .. 1024."""
    at_token: int = 0
    """Leading tokens that are shared: 1 .. tokens written of the source; 0 for all that are written."""
    first_sample_index: int = 0
    """`sample_index` of the first new table; the others count on. The request is the source's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fork:
    """Open tables that share blocks."""

    epoch: int
    tables: list[int]
    """Counters of the new tables."""
    block_ids: list[int]
    """The block table that each of them begins with."""
    token_count: int
    """Tokens that each of them has; all are written."""
    must_copy: bool
    """The last block is full in the source: every new table copies it before it writes there, the last holder too."""


@dataclasses.dataclass(slots=True)
class JournalEntry:
    """What happened to the tables of one pool since the last entry; see `quire.memsvc.v1.Journal`.

    The first five lists are rows of equal length, `token_ids` their tokens one after the other. `appended` and
    `replaced` hold (table, index, block) flat, three values a row.
    """

    pool_id: str
    epoch: int
    tables: list[int] = dataclasses.field(default_factory=list)
    token_starts: list[int] = dataclasses.field(default_factory=list)
    token_counts: list[int] = dataclasses.field(default_factory=list)
    written_counts: list[int] = dataclasses.field(default_factory=list)
    token_ids: MutableSequence[int] = dataclasses.field(default_factory=lambda: array("I"))
    appended: list[int] = dataclasses.field(default_factory=list)
    closed: list[int] = dataclasses.field(default_factory=list)
    close_reasons: list[CloseReason] = dataclasses.field(default_factory=list)
    returned: list[int] = dataclasses.field(default_factory=list)
    replaced: list[int] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.tables or self.appended or self.closed or self.returned or self.replaced)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolUpdated:
    """A pool appeared, changed its epoch, or was lost (`pool.ready` is false): older tables are void."""

    pool: PoolInfo


@dataclasses.dataclass(frozen=True, slots=True)
class BlocksRecalled:
    """memsvc wants `block_count` unused leased blocks back."""

    pool_id: str
    epoch: int
    block_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class BlocksMerged:
    """Blocks of this gateway's tables hold what others hold already, and may be exchanged for them.

    The gateway has the executor's tables name the offered blocks, and says so in `replaced` of a journal once the step
    that did it is done. What it does not take up is offered until the table closes.
    """

    pool_id: str
    epoch: int
    rows: list[tuple[int, int, int]]
    """(table, index, block that may take the place of the one there)."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryLost:
    """The connection is gone: every table and grant is void. `PoolUpdated` follows when there is a new one."""

    reason: str


MemoryEvent = PoolUpdated | BlocksRecalled | BlocksMerged | MemoryLost
MemoryListener = Callable[[MemoryEvent], None]


class Memory(Protocol):
    """The memory service, as one gateway uses it."""

    @property
    def gateway_incarnation(self) -> int:
        """Incarnation of the current connection; executors are told it, so that memsvc can fence this gateway."""
        ...

    async def start(self, listener: MemoryListener) -> None:
        """Connects and goes on reconnecting in the background; `listener` hears every event, the pools first."""
        ...

    async def close(self) -> None:
        """Disconnects. Grants fall back after the lease TTL, or at once when nothing was granted."""
        ...

    async def admit(self, request: AdmitRequest) -> Admission:
        """Opens a table: all of it or nothing.

        Raises:
            BlockPoolExhaustedError: short of blocks now; metadata has needed_block_count and available_block_count.
            PrefixPendingError: `wait_for_prefix` was set; metadata has the table that computes it (`table`), and how
                many tokens will be cached when that has `token_count` written.
            PromptTooLongError: more blocks than the whole pool has.
            PoolNotFoundError, StaleEpochError, MemoryUnavailableError.
        """
        ...

    async def fork(self, request: ForkRequest) -> Fork:
        """Opens tables that share every block of the beginning of another: all of them or none. Takes no block.

        What can be shared is what `journal` has reported as written by now.

        The blocks behind `token_count` are not shared. Who writes first into the last block, if that is partly filled,
        puts a leased block in its place (`JournalEntry.replaced`) and has the executor copy it; the last who names it
        writes in place. See `gateway.core.sharing`.

        Raises:
            SequenceNotFoundError: the source is not an open table of this gateway.
            InvalidRequestError: the count or the position is not possible; the message has the limits.
            PoolNotFoundError, StaleEpochError, MemoryUnavailableError.
        """
        ...

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """Brings the blocks ever granted in this epoch up to `granted_total`; returns the new ones, maybe too few.

        Raises:
            PoolNotFoundError, StaleEpochError, MemoryUnavailableError.
        """
        ...

    def journal(self, entry: JournalEntry) -> None:
        """Records what happened; never waits. Applied in order."""
        ...

    async def flush(self) -> None:
        """Waits until everything journalled so far is applied: what was closed is back in the pool.

        Raises:
            MemoryUnavailableError.
        """
        ...
