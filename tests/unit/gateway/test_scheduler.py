"""The scheduler's rules, one step at a time, with nothing but the scheduler."""

from __future__ import annotations

from array import array

import pytest

from gateway.core.queue import WaitingQueue
from gateway.core.request import Request, RequestSettings, SamplingSettings
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft, StepOutcome, Update
from quire.errors import AdmissionError, InvariantError
from quire.memory import Admission, CloseReason, Fork, PoolInfo, PoolSpec

POOL = PoolInfo("pool", 1, True, PoolSpec(101, 16, 1024, "m", "float32", 1000), "host:1", 1)


def make_request(prompt_length: int, max_tokens: int = 100, *, samples: int = 1, arrived_at: float = 0.0) -> Request:
    """Returns a request with a prompt of this length."""
    prompt = array("I", range(1, prompt_length + 1))
    settings = RequestSettings("r", "m", prompt, max_tokens, SamplingSettings(), sample_count=samples)
    return Request(settings, POOL.spec.max_model_len, arrived_at)


class Bench:
    """A scheduler, the next free block, and an executor that does what it is told."""

    def __init__(self, *, budget: int = 64, max_num_seqs: int = 8) -> None:
        """Starts with an empty lease."""
        self.scheduler = Scheduler(POOL, max_num_seqs, budget, max_preemptions=2)
        self.next_block = 1
        self.next_table = 1
        self.known: dict[int, int] = {}

    def blocks(self, count: int) -> list[int]:
        """Returns fresh blocks."""
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def admit(self, sequence: Sequence, cached: int = 0) -> Sequence:
        """Admits a sequence with blocks for the tokens it has."""
        blocks = self.blocks(-(-len(sequence.tokens) // 16))
        self.scheduler.start(sequence, Admission(1, self.next_table, blocks, cached, []))
        self.next_table += 1
        return sequence

    def grant(self, count: int) -> None:
        """Fills the lease."""
        self.scheduler.lease.refilled(self.blocks(count), count)

    def outcome(self, draft: StepDraft, token: int = 7) -> StepOutcome:
        """Returns the result of a step: every sequence whose tokens are all computed samples `token`."""
        tables, counts = draft.scheduled_tables, draft.scheduled_counts
        for sequence in draft.added:
            self.known[sequence.table] = len(sequence.tokens)
            self.known[-sequence.table] = sequence.cached_token_count
        sampled = []
        for table, count in zip(tables, counts, strict=True):
            self.known[-table] += count
            if self.known[-table] == self.known[table]:
                self.known[table] += 1
                sampled.append(table)
        written = [self.known[-table] for table in tables]
        return StepOutcome(tables, written, sampled, [token] * len(sampled), list(draft.removed), [])

    def step(self) -> tuple[StepDraft, Update]:
        """Plans a step and takes in its result."""
        draft = self.scheduler.schedule()
        return draft, self.scheduler.update(self.outcome(draft))


def one(prompt_length: int, max_tokens: int = 100) -> Sequence:
    """Returns the only sample of a new request."""
    return make_request(prompt_length, max_tokens).samples[0]


def test_a_long_prompt_is_split_by_the_budget_and_resumes_where_it_stopped() -> None:
    """Row 47: the token budget of a step must never be exceeded, and no token computed twice or left out."""
    bench = Bench(budget=64)
    bench.admit(one(150))
    counts = [bench.step()[0].scheduled_counts for _ in range(3)]
    assert counts == [[64], [64], [22]]


def test_decodes_come_before_prefill() -> None:
    """A long prompt must not make those wait that need one token."""
    bench = Bench(budget=20)
    decoding = bench.admit(one(5))
    bench.step()
    waiting = bench.admit(one(100))
    draft, _ = bench.step()
    assert draft.scheduled_tables == [decoding.table, waiting.table]
    assert draft.scheduled_counts == [1, 19]


def test_the_next_step_is_planned_before_the_result_is_back() -> None:
    """Two steps in flight: the second computes the token that the first one samples."""
    bench = Bench()
    sequence = bench.admit(one(5))
    first, second = bench.scheduler.schedule(), bench.scheduler.schedule()
    assert (first.scheduled_counts, second.scheduled_counts) == ([5], [1])
    assert sequence.pending == 2
    bench.scheduler.update(bench.outcome(first, 11))
    update = bench.scheduler.update(bench.outcome(second, 12))
    assert [token for _, token in update.tokens] == [12]
    assert list(sequence.tokens[5:]) == [11, 12]
    assert (sequence.computed, sequence.pending) == (6, 0)


def rows(update: Update) -> list[tuple[int, int, list[int], int]]:
    """Returns the rows of an update's journal: table, first position, tokens, written tokens."""
    journal = update.journal
    columns = zip(journal.tables, journal.token_starts, journal.token_counts, journal.written_counts, strict=True)
    found, offset = [], 0
    for table, start, count, written in columns:
        found.append((table, start, list(journal.token_ids[offset : offset + count]), written))
        offset += count
    assert offset == len(journal.token_ids)
    return found


def test_the_journal_names_a_sequence_when_it_fills_a_block_and_not_in_between() -> None:
    """A step must cost what changed: with a row for everyone in every step the memory service works for nothing."""
    bench = Bench()
    bench.grant(3)
    table = bench.admit(one(10)).table
    told = {step: rows(bench.step()[1]) for step in range(1, 40)}
    assert {step: row for step, row in told.items() if row} == {
        1: [(table, 10, [7], 10)],
        7: [(table, 11, [7] * 6, 16)],
        23: [(table, 17, [7] * 16, 32)],
        39: [(table, 33, [7] * 16, 48)],
    }


def test_a_long_prompt_is_told_chunk_by_chunk() -> None:
    """What is written of a prompt can be shared while the rest is still computed."""
    bench = Bench(budget=40)
    table = bench.admit(one(110)).table
    told = [rows(bench.step()[1]) for _ in range(3)]
    assert told == [[(table, 110, [], 40)], [(table, 110, [], 80)], [(table, 110, [7], 110)]]


def test_the_first_write_behind_a_copy_is_told_at_once() -> None:
    """The source of a copy is held until the memory service hears that the copy has run."""
    bench = Bench(budget=8)
    sequence = one(40)
    bench.scheduler.start(sequence, Admission(1, 1, bench.blocks(3), 19, [(90, 2)]))
    told = [rows(bench.step()[1]) for _ in range(3)]
    assert told == [[(1, 40, [], 27)], [(1, 40, [], 35)], [(1, 40, [7], 40)]]
    beside = one(40)
    bench.scheduler.start(beside, Admission(1, 2, bench.blocks(3), 19, []))
    draft, update = bench.step()
    assert draft.scheduled_counts == [1, 7]
    assert not rows(update)


@pytest.mark.parametrize("reason", [CloseReason.FINISHED, CloseReason.CANCELLED, CloseReason.FAILED])
def test_what_is_in_the_last_block_is_told_when_the_table_closes(reason: CloseReason) -> None:
    """Otherwise the next turn of a conversation computes the end of the last one again."""
    bench = Bench()
    sequence = bench.admit(one(10))
    table = sequence.table
    for _ in range(4):
        bench.step()
    bench.scheduler.finish(sequence, reason)
    update = bench.scheduler.update(bench.outcome(bench.scheduler.schedule()))
    assert update.journal.closed == [table]
    assert rows(update) == ([] if reason is CloseReason.FAILED else [(table, 11, [7] * 3, 13)])


def test_the_last_token_is_never_computed() -> None:
    """A sequence at its limit must not be scheduled for a token that nobody will read."""
    bench = Bench()
    bench.admit(one(5, max_tokens=1))
    assert bench.scheduler.schedule().scheduled_counts == [5]
    assert not bench.scheduler.schedule()


def test_a_block_is_taken_exactly_when_the_last_one_is_full() -> None:
    """Row 21: decode fills the open block without allocating; the token after a full block takes exactly one."""
    bench = Bench()
    bench.grant(2)
    sequence = bench.admit(one(15))
    appended = []
    for _ in range(19):
        draft, _ = bench.step()
        appended.append(list(draft.appended))
    # Step 1 computes the prompt, step 2 fills slot 15, step 3 opens block 1, step 19 opens block 2.
    assert [index for index, growth in enumerate(appended) if growth] == [2, 18]
    assert appended[2][:2] == [sequence.table, 1]
    assert len(sequence.blocks) == 3


def test_a_dry_lease_stalls_one_sequence_and_nobody_else() -> None:
    """A step must never wait for blocks: who needs one sits out, the others go on."""
    bench = Bench()
    bench.admit(one(16))
    easy = bench.admit(one(5))
    bench.step()
    draft = bench.scheduler.schedule()
    assert draft.scheduled_tables == [easy.table]
    assert not bench.scheduler.can_admit()
    assert bench.scheduler.stats.preemption_count == 0
    assert bench.scheduler.blocks_wanted() >= 1


def test_the_latest_admitted_is_preempted_and_keeps_its_tokens() -> None:
    """Rows 37 and 38: the victim is the latest admitted, keeps what it produced, and counts one preemption."""
    bench = Bench()
    first, second = bench.admit(one(16)), bench.admit(one(16))
    bench.step()
    bench.scheduler.lease.refilled([], 2)
    assert not bench.scheduler.schedule().scheduled_tables
    assert second.state is SequenceState.CLOSING
    assert second.preemption_count == 1
    assert first.state is SequenceState.RUNNING


def test_a_preempted_table_is_closed_only_after_the_fence() -> None:
    """Row 74: blocks return only after the executor has confirmed that nothing writes to them."""
    bench = Bench()
    bench.admit(one(16))
    second = bench.admit(one(16))
    table = second.table
    bench.step()
    bench.scheduler.lease.refilled([], 2)
    draft = bench.scheduler.schedule()
    assert draft.removed == [table]
    assert not bench.scheduler.can_admit(), "row 41: no admission in a step that preempted"
    update = bench.scheduler.update(bench.outcome(draft))
    assert update.journal.closed == [table]
    assert update.journal.close_reasons == [CloseReason.PREEMPTED]
    assert update.requeued == [second]
    assert (second.state, second.table, second.blocks) == (SequenceState.WAITING, 0, [])
    assert list(second.tokens[16:]) == [7]


def test_the_output_in_flight_of_a_preempted_sequence_is_delivered_once() -> None:
    """Row 39: a token sampled by a step that was in flight when its sequence was preempted must not be lost."""
    bench = Bench()
    bench.admit(one(16))
    second = bench.admit(one(14))
    bench.grant(0)
    steps = [bench.scheduler.schedule() for _ in range(3)]
    assert [second.table in draft.scheduled_tables for draft in steps] == [True, True, True]
    bench.scheduler.lease.refilled([], 1)
    steps.append(bench.scheduler.schedule())
    assert second.state is SequenceState.CLOSING
    produced = []
    for token, draft in enumerate(steps, 21):
        produced += [
            token
            for sequence, token in bench.scheduler.update(bench.outcome(draft, token)).tokens
            if sequence is second
        ]
    assert produced == list(second.tokens[14:])
    assert produced == [21, 22, 23]


def test_blocks_on_their_way_back_are_not_preempted_for_twice() -> None:
    """Pending-free blocks count: forgetting them preempts everyone, one after the other."""
    bench = Bench()
    for _ in range(4):
        bench.admit(one(16))
    bench.step()
    bench.scheduler.lease.refilled([], 4)
    bench.scheduler.schedule()
    closing = bench.scheduler.open_count - bench.scheduler.running_count
    bench.scheduler.lease.exhausted = True
    bench.scheduler.schedule()
    assert bench.scheduler.open_count - bench.scheduler.running_count == closing
    assert bench.scheduler.running_count >= 1


def test_the_earliest_sequence_is_never_preempted() -> None:
    """Whatever happens somebody finishes: a pool that holds one sequence finishes all of them in turn."""
    bench = Bench()
    first = bench.admit(one(16))
    bench.step()
    bench.scheduler.lease.refilled([], 1)
    for _ in range(3):
        bench.scheduler.lease.exhausted = True
        bench.scheduler.schedule()
    assert first.state is SequenceState.RUNNING


def test_a_sequence_preempted_too_often_is_spared() -> None:
    """Row 78: nobody is preempted more often than the cap while there is anybody else."""
    bench = Bench()
    first, second, third = bench.admit(one(16)), bench.admit(one(16)), bench.admit(one(16))
    third.preemption_count = 2
    bench.step()
    bench.scheduler.lease.refilled([], 3)
    bench.scheduler.schedule()
    assert second.state is SequenceState.CLOSING
    assert first.state is not SequenceState.FINISHED


def test_a_cancelled_sequence_that_never_ran_is_removed_without_a_trace() -> None:
    """Row 34: a table that the executor never heard of is closed like any other, and nothing starts it."""
    bench = Bench()
    sequence = bench.admit(one(20))
    table = sequence.table
    bench.scheduler.finish(sequence, CloseReason.CANCELLED)
    draft = bench.scheduler.schedule()
    assert (draft.added, draft.scheduled_tables, draft.removed) == ([], [], [table])
    update = bench.scheduler.update(bench.outcome(draft))
    assert update.released == [sequence]
    assert bench.scheduler.open_count == 0


def test_a_failed_sequence_fails_alone() -> None:
    """An error of one sequence must not touch the others of its batch."""
    bench = Bench()
    bad, good = bench.admit(one(5)), bench.admit(one(5))
    draft = bench.scheduler.schedule()
    outcome = bench.outcome(draft)
    outcome.errors.append((bad.table, "NAN_LOGITS", "all logits are NaN"))
    update = bench.scheduler.update(outcome)
    assert [failure[0] for failure in update.failed] == [bad]
    assert bad.state is SequenceState.FINISHED
    assert update.journal.close_reasons == [CloseReason.FAILED]
    assert bench.scheduler.schedule().scheduled_tables == [good.table]


def test_the_number_of_tables_never_exceeds_the_limit() -> None:
    """Row 49: closing tables still count, because the executor still holds them."""
    bench = Bench(max_num_seqs=2)
    first = bench.admit(one(5))
    bench.admit(one(5))
    assert not bench.scheduler.can_admit()
    bench.step()
    bench.scheduler.finish(first, CloseReason.FINISHED)
    assert not bench.scheduler.can_admit()
    bench.step()
    assert bench.scheduler.can_admit()


def test_a_table_granted_twice_is_a_defect() -> None:
    """Two owners of one table would corrupt both: the gateway must stop, not go on."""
    bench = Bench()
    bench.admit(one(5))
    bench.next_table = 1
    with pytest.raises(InvariantError, match="granted twice"):
        bench.admit(one(5))


def test_the_queue_is_first_come_first_served_and_bounded() -> None:
    """Order by arrival, stable under re-queueing; the bound is on requests that were never admitted."""
    queue = WaitingQueue(2)
    first, second = make_request(5), make_request(5)
    queue.push_request(first)
    queue.push_request(second)
    with pytest.raises(AdmissionError, match="2 requests wait, allowed are 2"):
        queue.push_request(make_request(5))
    head = queue.pop()
    assert head is first.samples[0]
    queue.push_request(make_request(5))
    queue.put_back([head])
    assert len(queue) == 3
    assert [queue.pop(), queue.pop()] == [head, second.samples[0]]
    assert not queue.remove(head)


def test_a_queue_forgets_those_who_leave_it() -> None:
    """Clients that come and cancel behind a head that cannot start must not make the gateway grow."""
    queue = WaitingQueue(1 << 20)
    head = make_request(5)
    queue.push_request(head)
    for _ in range(1000):
        request = make_request(5)
        queue.push_request(request)
        assert queue.remove(request.samples[0])
        assert not queue.remove(request.samples[0])
    assert len(queue._heaps[None]) < 100
    assert (len(queue), queue.pop(), queue.pop()) == (1, head.samples[0], None)


WINDOW_POOL = PoolInfo("pool", 1, True, PoolSpec(101, 16, 1024, "m", "float32", 1000, 40), "host:1", 1)


def windowed(prompt_length: int, *, stock: int, budget: int = 64) -> tuple[Bench, Sequence]:
    """Returns a scheduler of a pool with a window of 40 tokens, `stock` blocks in its lease, and one sequence."""
    bench = Bench(budget=budget)
    bench.scheduler = Scheduler(WINDOW_POOL, 8, budget, max_preemptions=2)
    bench.grant(stock)
    sequence = one(prompt_length)
    bench.scheduler.start(sequence, Admission(1, 1, bench.blocks(min(4, -(-prompt_length // 16))), 0, []))
    return bench, sequence


def test_a_prompt_in_a_sliding_window_grows_chunk_by_chunk() -> None:
    """Row 43: an admission brings the window's blocks; the rest of the prompt must not wait for blocks step by step."""
    bench, sequence = windowed(200, stock=20)
    drafts = [bench.step()[0] for _ in range(4)]
    assert [draft.scheduled_counts for draft in drafts] == [[64], [64], [64], [8]]
    assert [len(draft.appended) // 3 for draft in drafts] == [0, 4, 4, 1]
    assert drafts[1].appended[:3] == [1, 4, sequence.blocks[4] or drafts[1].appended[2]]


def test_a_chunk_is_as_long_as_the_lease_allows_and_the_next_blocks_are_asked_for() -> None:
    """Row 43: a short lease must slow a prompt down, not stop it or have it write where it has no block."""
    bench, _ = windowed(200, stock=1)
    bench.step()
    assert bench.scheduler.blocks_wanted() == 3
    assert bench.step()[0].scheduled_counts == [16]
    assert bench.scheduler.schedule().scheduled_counts == []
    assert bench.scheduler.stats.stalled_count == 1
    bench.grant(8)
    assert bench.step()[0].scheduled_counts == [64]


def test_the_gateway_makes_the_same_entries_null_as_the_memory_service() -> None:
    """Row 54: otherwise the two disagree about who holds a block."""
    bench, sequence = windowed(60, stock=20)
    written: list[int] = []
    for _ in range(60):
        _, update = bench.step()
        written += update.journal.written_counts
        outside = max(0, (written[-1] - 39) // 16)
        assert sequence.blocks.count(0) == sequence.released == outside
        assert sequence.held_block_count <= 4
        # It is told at the very token at which a block falls out of the window.
        assert outside == max(0, (sequence.computed - 39) // 16)


def test_a_sample_is_held_behind_its_prompt_until_its_siblings_are_forked() -> None:
    """Otherwise it writes into the block that they are about to share, and the memory service refuses its journal."""
    bench = Bench()
    request = make_request(20, samples=3)
    first = bench.admit(request.samples[0])
    draft = bench.scheduler.schedule()
    outcome = bench.outcome(draft)
    outcome.sibling_tables, outcome.sibling_tokens = [first.table] * 2, [8, 9]
    assert not bench.scheduler.schedule()
    update = bench.scheduler.update(outcome)
    assert update.siblings == [(first, request.samples[1:])]
    assert update.tokens == [(first, 7), (request.samples[1], 8), (request.samples[2], 9)]
    assert not bench.scheduler.schedule()
    bench.grant(1)
    bench.scheduler.fork(first.table, request.samples[1:], Fork(1, [11, 12], list(first.blocks), 20, must_copy=False))
    first.resume()
    draft = bench.scheduler.schedule()
    # One block is there: one copies, and the others wait for theirs.
    assert (draft.copies, draft.replaced) == ([2, 3], [1, 1, 3])
    assert draft.scheduled_tables == [first.table]
    bench.grant(1)
    draft = bench.scheduler.schedule()
    assert (draft.copies, draft.replaced) == ([2, 4], [11, 1, 4])
    assert draft.scheduled_tables == [first.table, 11, 12], "the last holder writes in place"
