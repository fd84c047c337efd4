"""Gateways: who they are, when they were last heard, what was granted to them.

A gateway is one connection, named by (gateway_id, incarnation). A newer incarnation voids the older at once.
"""

from __future__ import annotations

from collections import OrderedDict
import dataclasses
from typing import Generic, TypeVar

from quire.errors import StaleEpochError

Answer = TypeVar("Answer")

ANSWER_LIMIT = 1024


class AnswerLog(Generic[Answer]):
    """Answers given on one stream, so that a repeated request gets the same one again.

    It keeps the newest ANSWER_LIMIT answers; a request number below all of them, once some were dropped, is refused.
    """

    __slots__ = ("_answers", "_floor")

    def __init__(self) -> None:
        self._answers: OrderedDict[int, Answer] = OrderedDict()
        self._floor = -1

    def get(self, request_no: int) -> Answer | None:
        """Returns the answer given to `request_no`, or None if it is new.

        Raises:
            StaleEpochError: too old to tell.
        """
        answer = self._answers.get(request_no)
        if answer is None and request_no <= self._floor:
            raise StaleEpochError(
                f"request_no {request_no} is not above {self._floor}, the highest whose answer is no longer kept",
                reason="STALE_REQUEST",
                field="request_no",
            )
        return answer

    def put(self, request_no: int, answer: Answer) -> None:
        """Keeps an answer."""
        self._answers[request_no] = answer
        if len(self._answers) > ANSWER_LIMIT:
            self._floor = max(self._floor, self._answers.popitem(last=False)[0])


@dataclasses.dataclass(slots=True)
class Grants:
    """What one gateway holds of one pool in the current epoch."""

    granted_total: int = 0
    """Blocks ever granted for growth."""
    leased: int = 0
    """Of these, blocks not yet in a table and not returned."""
    recalled: int = 0
    """Blocks asked back and not yet returned."""
    tables: set[int] = dataclasses.field(default_factory=set)
    """Counters of its tables."""


@dataclasses.dataclass(slots=True)
class Gateway:
    """One connection of a gateway."""

    number: int
    """Small positive number, never used again."""
    gateway_id: str
    incarnation: int
    expires_at: float
    """Its lease ends then, in seconds of the caller's clock."""
    journal_nos: dict[str, int] = dataclasses.field(default_factory=dict)
    """Highest journal taken, by pool. Not tied to an epoch: numbers go on over a change of it."""
    closed: bool = False
    """Nothing more is accepted from it; its blocks wait for the executors' fences."""


@dataclasses.dataclass(frozen=True, slots=True)
class FenceRequired:
    """An executor must be told that a gateway is gone; `MemoryCore.fenced` takes its answer."""

    pool_id: str
    epoch: int
    executor_address: str
    gateway_number: int
    gateway_incarnation: int


@dataclasses.dataclass(frozen=True, slots=True)
class PoolChanged:
    """A pool appeared, changed its epoch, or was lost."""

    pool_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseRecalled:
    """A gateway is asked to return unused blocks."""

    gateway_number: int
    pool_id: str
    epoch: int
    block_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class MergeOffered:
    """Blocks of a gateway's tables hold what others hold already."""

    gateway_number: int
    pool_id: str
    epoch: int
    rows: list[tuple[int, int, int]]
    """(table, index, block that may take the place of the one there)."""


CoreEvent = FenceRequired | PoolChanged | LeaseRecalled | MergeOffered
