"""What the scheduler must do with memory, each in a few steps. A scenario raises when it does not."""

from __future__ import annotations

from array import array
import itertools

from gateway.core.request import Request, RequestSettings, SamplingSettings
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft, StepOutcome, Update
from quire.memory import Admission, CloseReason, PoolInfo, PoolSpec

Copies = tuple[tuple[int, int], ...]

SIZE = 16
INFO = PoolInfo("pool", 1, True, PoolSpec(201, SIZE, 1024, "m", "float32", 1000), "host:1", 1)


class Machine:
    """A scheduler, blocks to give it, and an executor that does what it is told, steps after it was told."""

    def __init__(self, *, budget: int = 64, max_num_seqs: int = 8) -> None:
        """Starts with an empty lease."""
        self.scheduler = Scheduler(INFO, max_num_seqs, budget, max_preemptions=2)
        self._blocks = itertools.count(1)
        self._tables = itertools.count(1)
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self.closed: list[int] = []

    def admit(self, length: int, *, cached: int = 0, copies: Copies = ()) -> Sequence:
        """Admits a sequence with blocks for its prompt."""
        prompt = array("I", range(1, length + 1))
        settings = RequestSettings("r", "m", prompt, 500, SamplingSettings())
        sequence = Request(settings, INFO.spec.max_model_len, 0.0).samples[0]
        blocks = [next(self._blocks) for _ in range(-(-length // SIZE))]
        self.scheduler.start(sequence, Admission(1, next(self._tables), blocks, cached, list(copies)))
        return sequence

    def grant(self, count: int) -> None:
        """Fills the lease; 0 says that the pool has nothing."""
        self.scheduler.lease.refilled([next(self._blocks) for _ in range(count)], max(count, 1))

    def plan(self) -> StepDraft:
        """Plans a step; nobody computes for whom there is no block."""
        draft = self.scheduler.schedule()
        for sequence in draft.added:
            self._known[sequence.table] = len(sequence.tokens)
            self._computed[sequence.table] = sequence.cached_token_count
        held = {sequence.table: sequence for sequence in self.scheduler.sequences()}
        for table in draft.scheduled_tables:
            if table in held:
                assert held[table].scheduled <= len(held[table].blocks) * SIZE, "a token without a slot"
        assert sum(draft.scheduled_counts) <= 64, "more than the budget"
        assert all(count > 0 for count in draft.scheduled_counts)
        return draft

    def outcome(self, draft: StepDraft) -> StepOutcome:
        """Returns what the executor answers."""
        written, sampled = [], []
        for table, count in zip(draft.scheduled_tables, draft.scheduled_counts, strict=True):
            self._computed[table] += count
            written.append(self._computed[table])
            if self._computed[table] == self._known[table]:
                self._known[table] += 1
                sampled.append(table)
        tokens = [1000 + self._known[table] for table in sampled]
        return StepOutcome(list(draft.scheduled_tables), written, sampled, tokens, list(draft.removed), [])

    def take(self, draft: StepDraft) -> Update:
        """Takes in the result of a step."""
        outcome = self.outcome(draft)
        update = self.scheduler.update(outcome)
        written = dict(zip(outcome.written_tables, outcome.written_counts, strict=True))
        rows = zip(update.journal.tables, update.journal.written_counts, strict=True)
        for table, count in rows:
            assert count <= written.get(table, count), "told as written before it was"
        assert set(update.journal.closed) <= set(draft.removed), "closed without a fence"
        self.closed += update.journal.closed
        return update

    def step(self) -> Update:
        """Plans a step and takes in its result."""
        return self.take(self.plan())


def tables_close_only_behind_their_fence() -> None:
    """A sequence that ended is removed by the next step, and closed when that step's result says so."""
    machine = Machine()
    first, second = machine.admit(10), machine.admit(12)
    machine.step()
    ended = first.table
    in_flight = machine.plan()
    machine.scheduler.finish(first, CloseReason.FINISHED)
    assert not machine.take(in_flight).journal.closed
    assert machine.scheduler.open_count == 2
    removing = machine.plan()
    assert removing.removed == [ended]
    assert removing.scheduled_tables == [second.table]
    assert machine.take(removing).journal.closed == [ended]
    assert machine.scheduler.open_count == 1
    assert first.state is SequenceState.FINISHED


def nothing_is_told_before_it_is_written() -> None:
    """Every prefix of the journal is true when it is sent: chunks of a prompt, then single tokens."""
    machine = Machine(budget=20)
    sequence = machine.admit(50)
    told: list[int] = []
    for _ in range(8):
        machine.grant(1)
        update = machine.step()
        told += update.journal.written_counts
    assert told == sorted(told)
    assert told[-1] >= 48
    assert sequence.computed == 50 + 8 - 3


def blocks_on_their_way_count() -> None:
    """Blocks of tables that wait for their fence are not preempted for again; the earliest sequence always goes on."""
    machine = Machine()
    sequences = [machine.admit(2 * SIZE) for _ in range(4)]
    for _ in range(3):
        machine.step()
    machine.grant(0)
    machine.plan()
    assert [sequence.preemption_count for sequence in sequences] == [0, 0, 1, 1]
    machine.grant(0)
    machine.plan()
    assert [sequence.preemption_count for sequence in sequences] == [0, 0, 1, 1]


def the_latest_is_preempted_and_comes_back() -> None:
    """The victim keeps its tokens, is queued again behind its fence, and counts one preemption."""
    machine = Machine()
    first, second = machine.admit(SIZE), machine.admit(2 * SIZE)
    machine.step()
    machine.grant(0)
    removing = machine.plan()
    assert (first.preemption_count, second.preemption_count) == (0, 1)
    tokens = list(second.tokens)
    machine.grant(2)
    growing = machine.plan()
    assert growing.scheduled_tables == [first.table]
    assert not machine.scheduler.can_admit()
    update = machine.take(removing)
    assert machine.scheduler.can_admit()
    machine.take(growing)
    assert update.requeued == [second]
    assert list(second.tokens)[: len(tokens)] == tokens
    assert (second.state, second.table, second.computed) == (SequenceState.WAITING, 0, 0)
    assert update.journal.close_reasons == [CloseReason.PREEMPTED]
    lonely = Machine()
    only = lonely.admit(SIZE)
    lonely.step()
    lonely.grant(0)
    lonely.plan()
    assert only.preemption_count == 0


def a_stalled_sequence_holds_admissions_back() -> None:
    """While somebody waits for a block nobody new is admitted, and everybody else goes on."""
    machine = Machine()
    stalled, other = machine.admit(SIZE), machine.admit(SIZE + 4)
    machine.step()
    draft = machine.plan()
    assert draft.scheduled_tables == [other.table]
    assert not machine.scheduler.can_admit()
    assert machine.scheduler.blocks_wanted() >= 1
    machine.take(draft)
    machine.grant(2)
    draft = machine.plan()
    assert stalled.table in draft.scheduled_tables
    assert draft.appended[:2] == [stalled.table, 1]
    assert machine.scheduler.can_admit()


def a_block_is_taken_when_the_last_is_full() -> None:
    """One block for each block_size tokens, at the token that needs it, and no block twice."""
    machine = Machine()
    sequence = machine.admit(SIZE - 2)
    machine.grant(8)
    appended: list[int] = []
    for _ in range(2 * SIZE + 2):
        draft = machine.plan()
        appended += draft.appended
        machine.take(draft)
    assert len(appended) == 3 * 2
    assert appended[1::3] == [1, 2]
    assert len(set(sequence.blocks)) == 3
    assert len(machine.scheduler.lease) == 6


def tokens_in_flight_are_delivered_once() -> None:
    """Two steps deep, no token is lost or repeated, also of one that is preempted meanwhile."""
    machine = Machine()
    first, second = machine.admit(SIZE - 1), machine.admit(SIZE + 1)
    steps = [machine.plan()]
    delivered: list[tuple[Sequence, int]] = []
    for _ in range(10):
        machine.grant(1)
        steps.append(machine.plan())
        delivered += machine.take(steps.pop(0)).tokens
    for sequence in (first, second):
        tokens = [token for owner, token in delivered if owner is sequence]
        assert tokens == list(sequence.tokens)[sequence.prompt_length :]
        assert tokens == [1000 + sequence.prompt_length + 1 + index for index in range(len(tokens))]
        assert len(tokens) >= 8


def limits_hold() -> None:
    """Neither the token budget nor the number of tables is exceeded; a finish told twice ends once."""
    machine = Machine(budget=64, max_num_seqs=2)
    long, other = machine.admit(100), machine.admit(90)
    assert not machine.scheduler.can_admit()
    for _ in range(4):
        machine.grant(1)
        machine.step()
    assert (long.computed >= 100, other.computed >= 90) == (True, True)
    for _ in range(2):
        machine.scheduler.finish(other, CloseReason.CANCELLED)
    table = other.table
    machine.step()
    machine.scheduler.finish(other, CloseReason.CANCELLED)
    assert machine.closed == [table]
    assert machine.scheduler.can_admit()


def told(update: Update) -> dict[int, int]:
    """Returns what a journal says: the written tokens of each table that it names."""
    return dict(zip(update.journal.tables, update.journal.written_counts, strict=True))


def a_block_is_told_when_it_is_full() -> None:
    """The journal names a sequence at the end of its prompt, when a block is full, and when it closes; not between."""
    machine = Machine()
    machine.grant(4)
    sequence = machine.admit(SIZE - 4)
    table = sequence.table
    assert told(machine.step()) == {table: SIZE - 4}
    assert [told(machine.step()) for _ in range(4)] == [{}, {}, {}, {table: SIZE}]
    in_flight = [machine.plan() for _ in range(3)]
    assert not told(machine.take(in_flight[0]))
    sequence.ended = True
    machine.scheduler.finish(sequence, CloseReason.FINISHED)
    for draft in in_flight[1:]:
        assert not told(machine.take(draft))
    known = len(sequence.tokens)
    assert sequence.computed == known + 1
    assert told(machine.step()) == {table: known}
    assert machine.closed == [table]


def a_copy_is_told_when_it_has_run() -> None:
    """The source of a copy is held until the journal names the table that was copied to: at its first write."""
    machine = Machine(budget=4)
    copied = machine.admit(2 * SIZE, cached=SIZE + 3, copies=((99, 2),))
    assert told(machine.step()) == {copied.table: SIZE + 7}
    assert told(machine.step()) == {}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        tables_close_only_behind_their_fence,
        nothing_is_told_before_it_is_written,
        blocks_on_their_way_count,
        the_latest_is_preempted_and_comes_back,
        a_stalled_sequence_holds_admissions_back,
        a_block_is_taken_when_the_last_is_full,
        tokens_in_flight_are_delivered_once,
        limits_hold,
        a_block_is_told_when_it_is_full,
        a_copy_is_told_when_it_has_run,
    )
}
