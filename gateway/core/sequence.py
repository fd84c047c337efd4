"""A sequence: one token series being decoded, and how far it has come.

    0 ....... computed ....... scheduled ....... total
    |  KV confirmed  |  in flight  |  still to plan  |

`total` is the tokens known plus those that steps in flight will sample (`pending`). A step raises `scheduled`; its
result raises `computed`. When `scheduled` reaches `total` the step samples one more token, so `total` rises by one: the
computed tokens chase the total.
"""

from __future__ import annotations

from array import array
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.request import Request
    from gateway.core.swapping import SwappedOut
    from quire.memory import Admission


class SequenceState(enum.Enum):
    """Life: NEW -> WAITING -> RUNNING -> CLOSING -> FINISHED; a preempted one goes from CLOSING to WAITING."""

    NEW = enum.auto()
    """Not queued yet: a further sample of a request waits for the first one's prompt."""
    WAITING = enum.auto()
    """In the queue, or being admitted; holds no table."""
    RUNNING = enum.auto()
    """Has a table and is scheduled."""
    CLOSING = enum.auto()
    """No longer scheduled; its table is held until the executor has fenced it."""
    FINISHED = enum.auto()
    """Holds nothing."""


class Sequence:
    """One sample of a request. Mutated by the scheduler only.

    Attributes:
        total: tokens known and tokens being sampled.
        room: tokens for which its blocks have slots that it may write to.
        cumulative_logprob: sum of the log-probabilities of its generated tokens, where they are known.
        stepwise: whether it is held after every token: a beam.
        length_limit: most tokens that it may ever have, prompt included.
        total_limit: most tokens that it may have for now: less than `length_limit` while further samples are to begin
            on its blocks, into which nobody may write meanwhile.
        released: leading entries of `blocks` that are null: blocks outside the sliding window.
        reported: tokens that the memory service has been told of.
        report_at: value of `computed` at which the memory service is to hear of it again.
        block_seconds: blocks held times seconds, up to `counted_at`.
        charged_token_count: tokens generated that are on its tenant's account; see `gateway.core.fairness`.
        shared_block_count: blocks that it had from others when it was first admitted.
        lost_token_count: tokens that were computed when it lost its last table.
        recomputed_token_count: tokens that it has computed, or is to compute, again.
        stored_token_count: tokens of blocks that it has filled itself.
        begun_at: leading tokens that its table began with: found in the cache, or moved in from host memory.
        swapped: what of it is in host memory while it waits.
        stayed_token_count: tokens of the blocks that others named, too, when it lost its last table.
        swap_count: preemptions after which its content was in host memory.
        swapped_block_count: blocks that were moved there and back.
    """

    __slots__ = (
        "admission_no",
        "begun_at",
        "block_seconds",
        "blocks",
        "cached_token_count",
        "charged_token_count",
        "computed",
        "counted_at",
        "cumulative_logprob",
        "ended",
        "epoch",
        "index",
        "length_limit",
        "lost_token_count",
        "preemption_count",
        "prompt_length",
        "recomputed_token_count",
        "released",
        "report_at",
        "reported",
        "request",
        "room",
        "scheduled",
        "shared_block_count",
        "state",
        "stayed_token_count",
        "stepwise",
        "stored_token_count",
        "swap_count",
        "swapped",
        "swapped_block_count",
        "table",
        "tokens",
        "total",
        "total_limit",
    )

    def __init__(self, request: Request, index: int, prompt: array[int], length_limit: int) -> None:
        """Starts a sequence.

        Args:
            request: whose sample it is.
            index: which sample, from 0.
            prompt: token ids, copied.
            length_limit: most tokens it may have, prompt included.
        """
        self.request = request
        self.index = index
        self.tokens = array("I", prompt)
        self.prompt_length = len(prompt)
        self.length_limit = self.total_limit = length_limit
        self.state = SequenceState.NEW
        self.ended = False
        self.preemption_count = 0
        self.admission_no = 0
        self.cached_token_count = 0
        self.cumulative_logprob = 0.0
        self.stepwise = False
        self.table = 0
        self.epoch = 0
        self.blocks: list[int] = []
        self.block_seconds = 0.0
        self.counted_at = 0.0
        self.shared_block_count = 0
        self.charged_token_count = 0
        self.stored_token_count = 0
        self.recomputed_token_count = 0
        self.begun_at = 0
        self.swapped: SwappedOut | None = None
        self.stayed_token_count = 0
        self.swap_count = 0
        self.swapped_block_count = 0
        self.computed = 0
        self.clear_table()

    def clear_table(self) -> None:
        """Forgets the table: everything is to be computed again."""
        self.table = 0
        self.epoch = 0
        self.blocks = []
        self.room = 0
        self.released = 0
        self.scheduled = 0
        self.lost_token_count = self.computed
        self.computed = 0
        self.total = len(self.tokens)
        self.reported = 0
        self.report_at = 0

    def take_table(self, admission: Admission, admission_no: int, block_size: int, now: float) -> None:
        """Runs on a new table from here on; what it finds there is computed.

        Args:
            admission: the table.
            admission_no: its place among all that were ever admitted.
            block_size: tokens in a block.
            now: seconds, see `count_blocks`.
        """
        self.state = SequenceState.RUNNING
        self.admission_no = admission_no
        self.table, self.epoch = admission.table, admission.epoch
        self.blocks = list(admission.block_ids)
        self.room = len(self.blocks) * block_size
        self.counted_at = now
        if not self.preemption_count:
            self.shared_block_count = admission.cached_token_count // block_size
        self.cached_token_count = self.computed = admission.cached_token_count
        self.reported = self.total = len(self.tokens)

    def begin_at(self, token_count: int) -> None:
        """Computes on behind so many tokens, which its table holds or is about to."""
        self.recomputed_token_count += max(0, self.lost_token_count - token_count)
        self.begun_at = self.scheduled = token_count

    @property
    def pending(self) -> int:
        """Tokens that steps in flight will sample."""
        return self.total - len(self.tokens)

    def hold(self) -> None:
        """Lets it sample one more token and go no further, until `resume`."""
        self.total_limit = min(self.length_limit, len(self.tokens) + 1)

    def resume(self) -> None:
        """Lets it go on to its end, or by one token if it goes step by step."""
        if self.stepwise:
            self.hold()
        else:
            self.total_limit = self.length_limit

    @property
    def held(self) -> bool:
        """Whether it has all tokens that it may have for now."""
        return len(self.tokens) >= self.total_limit

    @property
    def held_block_count(self) -> int:
        """Blocks that its table holds."""
        return len(self.blocks) - self.released

    def note_stored(self, written: int, block_size: int) -> None:
        """Counts what it has filled itself, of so many tokens that are written."""
        stored = (written // block_size - self.shared_block_count) * block_size
        self.stored_token_count = max(self.stored_token_count, stored)

    def count_blocks(self, now: float) -> None:
        """Counts what its blocks have cost up to `now` seconds; called before their number changes."""
        self.block_seconds += self.held_block_count * (now - self.counted_at)
        self.counted_at = now

    def release(self, end: int) -> None:
        """Makes the entries before `end` null."""
        self.blocks[self.released : end] = [0] * (end - self.released)
        self.released = end

    @property
    def completion_length(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length
