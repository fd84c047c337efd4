"""What the memory service keeps outside its own process.

    directory   epochs that never fall, and which services are there
    journals    what each pool caches, as a stream of changes that a reader can join at any time
    hints       which pools hold which prefixes, to be looked up in a few commands

Nothing here is on the path of a step. A store that does not answer costs nothing but what it would have told; one that
has lost its contents says so (`StoreFencedError`, `Store.losses`), and is filled again by those who own them.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Protocol

from quire.errors import StaleEpochError
from quire.hashing import DIGEST_BYTES

HINT_TOKENS = 64
"""A hint is kept for every so many tokens of a prefix."""


class StoreFencedError(StaleEpochError):
    """The store does not hold what the caller left there: it was emptied or set back, or another took over."""

    default_reason = "STORE_FENCED"


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One running service."""

    kind: str
    """"memsvc" or "executor"."""
    name: str
    """Stable over restarts."""
    nonce: int
    """Incarnation; drawn at each start."""
    address: str
    """host:port."""
    space: str = ""
    """Of an executor: whose blocks its blocks can equal (`HintSpace.text`)."""


@dataclasses.dataclass(frozen=True, slots=True)
class JournalPosition:
    """How far a reader has come."""

    life: str
    """Which unbroken run of the journal; a position means nothing in another."""
    sequence: int
    """Entries of this life that were read."""


@dataclasses.dataclass(frozen=True, slots=True)
class JournalRead:
    """What `JournalStore.read` found, all of one instant."""

    position: JournalPosition
    """To go on from."""
    snapshot: list[bytes] | None
    """Everything as it was before `entries`, in place of all that was read so far; None to go on from that."""
    entries: list[bytes]
    """What changed since, in order."""


class JournalStore(Protocol):
    """A journal for each pool: one writer, any number of readers. Entries are opaque here.

    A journal is a snapshot and the entries since. Entries are numbered 1, 2, 3, ... within a life; the writer installs
    a new snapshot now and then, and older entries go. Every method raises StoreUnavailableError.
    """

    async def begin(self, pool_id: str, epoch: int, life: str, snapshot: Sequence[bytes]) -> None:
        """Starts a new life of a journal with everything there is.

        Args:
            pool_id: the pool.
            epoch: its epoch; a writer of a lower one is refused.
            life: chosen by the writer, never used before.
            snapshot: the state, in pieces of any size.

        Raises:
            StoreFencedError: a writer of a higher epoch has begun.
        """
        ...

    async def append(self, pool_id: str, life: str, sequence: int, entries: Sequence[bytes]) -> None:
        """Appends the entries after `sequence`. May be repeated when it is not known whether it was done.

        Raises:
            StoreFencedError: the journal is not where this writer left it.
        """
        ...

    async def checkpoint(self, pool_id: str, life: str, sequence: int, snapshot: Sequence[bytes], keep: int) -> None:
        """Installs the state as of `sequence` as the snapshot, and drops all but the last `keep` entries.

        Raises:
            StoreFencedError: the journal is not where this writer left it.
        """
        ...

    async def renew(self, pool_id: str, life: str, sequence: int) -> None:
        """Keeps an idle journal from being forgotten.

        Raises:
            StoreFencedError: the journal is not where this writer left it.
        """
        ...

    async def end(self, pool_id: str, life: str) -> None:
        """Removes a journal, if it still has this life."""
        ...

    async def read(self, pool_id: str, position: JournalPosition | None, limit: int) -> JournalRead | None:
        """Returns up to `limit` entries after `position`, with a snapshot before them if that is not there any more.

        Returns None if there is no journal, or only a damaged one: its writer has not begun, or will begin again.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class HintSpace:
    """Pools whose blocks can be equal: an identity of one means the same in all."""

    model_id: str
    block_size: int
    kv_dtype: str

    @property
    def text(self) -> str:
        """The space in one line, for records; `parse` reads it."""
        return f"{self.block_size} {self.kv_dtype} {self.model_id}"

    @classmethod
    def parse(cls, text: str) -> HintSpace | None:
        """Returns the space in a line, or None if there is none."""
        block_size, _, rest = text.partition(" ")
        kv_dtype, separator, model_id = rest.partition(" ")
        return cls(model_id, int(block_size), kv_dtype) if separator and block_size.isdigit() else None

    @property
    def key(self) -> str:
        """A short name, safe in keys."""
        return hashlib.blake2b(self.text.encode(), digest_size=6).hexdigest()

    @property
    def stride(self) -> int:
        """Every how many blocks a hint is kept."""
        return max(1, HINT_TOKENS // self.block_size)


@dataclasses.dataclass(frozen=True, slots=True)
class HintOwner:
    """A pool that hints lead to."""

    pool_id: str
    executor_incarnation: int
    executor_address: str
    memsvc_id: str
    memsvc_incarnation: int
    memsvc_address: str


@dataclasses.dataclass(frozen=True, slots=True)
class HintTicket:
    """Right to write hints: names the index as it was found, and the owner in it."""

    space: str
    epoch: str
    tag: int
    generation: int
    bucket_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class HintMatch:
    """A pool that holds the beginning of a chain."""

    owner: HintOwner
    depth: int
    """Leading identities that were asked for and are hinted at."""


class HintStore(Protocol):
    """For each space an index from identities to the pools that hold them.

    An entry names its owner by a small tag. The owner's lease is looked at by every search: when it ends, all entries
    of that tag mean nothing at once, and `sweep` removes them by and by. Every method raises StoreUnavailableError.
    """

    async def join(self, space: str, owner: HintOwner, capacity: int, ttl: float) -> HintTicket:
        """Starts to hold hints for a pool, none at first; hints of the same pool under an older ticket are void.

        Args:
            space: key of the space.
            owner: the pool.
            capacity: how many hints it may come to hold; the index grows if they do not fit.
            ttl: seconds that the lease lasts.
        """
        ...

    async def update(self, ticket: HintTicket, update_count: int, added: bytes, removed: bytes) -> None:
        """Adds and removes hints.

        Args:
            ticket: of `join`.
            update_count: updates made under this ticket so far.
            added: identities, 16 bytes each; those that are there already may be among them.
            removed: identities, none of which is in `added`.

        Raises:
            StoreFencedError: the ticket is void, or the store missed an update.
        """
        ...

    async def renew(self, ticket: HintTicket, update_count: int, ttl: float) -> None:
        """Extends the lease.

        Raises:
            StoreFencedError: as `update`.
        """
        ...

    async def leave(self, ticket: HintTicket) -> None:
        """Ends the lease: no hint of the ticket is found any more."""
        ...

    async def find(self, space: str, identities: bytes) -> list[HintMatch]:
        """Returns who holds how many leading identities of a chain, those who hold none left out.

        Assumes that whoever holds an identity of the chain holds those before it: blocks of a prefix are given up from
        its end. Where that is not so the answer may be too high. Hints always may be wrong.
        """
        ...

    async def sweep(self, space: str) -> bool:
        """Removes some entries whose owners are gone, in bounded time; true if there may be more."""
        ...


class Store(Protocol):
    """Shared metadata. Every method raises StoreUnavailableError when the store does not answer in time."""

    @property
    def journals(self) -> JournalStore:
        """What pools cache."""
        ...

    @property
    def hints(self) -> HintStore:
        """Which pools hold which prefixes."""
        ...

    @property
    def losses(self) -> int:
        """How often the directory was found empty, or not to be the one that was written to."""
        ...

    async def start(self) -> None:
        """Connects. Does not raise: a store that is down now may come up."""
        ...

    async def close(self) -> None:
        """Disconnects."""
        ...

    async def raise_epoch(self, pool_id: str, floor: int) -> int:
        """Raises the epoch of a pool above both `floor` and what is stored, stores it and returns it."""
        ...

    async def keep_epoch(self, pool_id: str, epoch: int) -> None:
        """Stores `epoch` unless a higher one is stored."""
        ...

    async def announce(self, record: ServiceRecord, ttl: float, *, takeover: bool = False) -> bool:
        """Notes that a service is there for the next `ttl` seconds.

        Returns false, and changes nothing, if another incarnation of the same name is noted and `takeover` is not set.
        """
        ...

    async def withdraw(self, record: ServiceRecord) -> bool:
        """Removes a service's note; false, with nothing changed, if another incarnation's is there."""
        ...

    async def services(self, kind: str) -> list[ServiceRecord]:
        """Returns the services of `kind` that are noted, by name."""
        ...


def split_identities(identities: bytes) -> list[bytes]:
    """Returns the 16-byte identities in a column."""
    return [identities[start : start + DIGEST_BYTES] for start in range(0, len(identities), DIGEST_BYTES)]
