"""The scheduler of one executor: computed tokens chase total tokens.

A step is a token budget, spent first on sequences that need one token (decodes), then on chunks of longer remainders
(prefill, and what a preempted sequence recomputes). Nothing here waits: a sequence that needs a block which the growth
lease does not have sits the step out; if the pool has none to give, another sequence is preempted.

A table that ends (finished, cancelled, preempted) is named in the next step's `removed`; only when that step's result
confirms it (`fenced`) is it closed in the journal. A preempted sequence keeps its tokens, its samples in flight
included, and goes back to the head of the queue then.

The journal says what changed for the memory service (see `gateway.core.report`): of 256 sequences that decode with
blocks of 16 tokens a step tells of 16.

Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.core.lease import GrowthLease
from gateway.core.precedence import SchedulingPolicy, place_in_step
from gateway.core.preemption import choose_victim, last_held
from gateway.core.report import report, report_at
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.sharing import SharedTails
from gateway.core.shortage import SPARING, Shortage
from gateway.core.siblings import assign_logprobs, take_first_tokens
from gateway.core.stats import SchedulerStats
from gateway.core.step import LOGPROB_CHUNK, StepDraft, StepOutcome, Update
from gateway.core.swapping import Swapping, SwapSettings
from quire.errors import InvariantError
from quire.memory import Admission, CloseReason, Fork, JournalEntry, PoolInfo
from quire.window import outside_block_count


class Scheduler:
    """Plans the steps of one executor and keeps its sequences.

    Args:
        pool: the pool it schedules; a new epoch needs a new scheduler.
        max_num_seqs: most sequences with a table.
        max_num_batched_tokens: token budget of a step.
        max_preemptions: see `choose_victim`.
        policy: what decides who gets tokens and blocks first, and who gives way.
        long_prefill_token_threshold: most tokens of one remainder in a step that others take part in; 0 for no limit.
        swap: host memory for what preempted sequences have computed; none by default.
    """

    def __init__(
        self,
        pool: PoolInfo,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_preemptions: int,
        *,
        policy: SchedulingPolicy = SchedulingPolicy.FCFS,
        long_prefill_token_threshold: int = 0,
        swap: SwapSettings | None = None,
    ) -> None:
        self.pool = pool
        self.lease = GrowthLease(pool.spec.usable_block_count, pool.spec.block_size)
        self.stats = SchedulerStats()
        self.swapping = Swapping(pool.pool_id, pool.spec, swap or SwapSettings())
        self.now = 0.0
        """Seconds at which what is called next happens; the caller's to set, and only for what blocks have cost."""
        self._block_size = pool.spec.block_size
        self._window = pool.spec.window
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._max_preemptions = max_preemptions
        self._policy = policy
        self._longest_chunk = long_prefill_token_threshold or max_num_batched_tokens
        self._running: dict[int, Sequence] = {}
        self._closing: dict[int, tuple[Sequence, CloseReason]] = {}
        self._to_add: list[Sequence] = []
        self._to_copy: list[int] = []
        self._to_remove: list[int] = []
        self._admission_no = 0
        self._unmet = 0
        self._shortage = Shortage()
        self._tails = SharedTails()
        self.forking_count = 0
        """Tables that are being forked."""

    @property
    def running_count(self) -> int:
        """Sequences that are scheduled."""
        return len(self._running)

    @property
    def open_count(self) -> int:
        """Sequences that hold a table, closing ones and tables that are being forked included."""
        return len(self._running) + len(self._closing) + self.forking_count

    @property
    def free_count(self) -> int:
        """Sequences that may be opened besides."""
        return max(0, self._max_num_seqs - self.open_count)

    def sequences(self) -> Iterator[Sequence]:
        """Yields every sequence that holds a table, in order of admission."""
        held = [*self._running.values(), *(sequence for sequence, _ in self._closing.values())]
        yield from sorted(held, key=lambda sequence: sequence.admission_no)

    def can_admit(self) -> bool:
        """Whether a new sequence may be admitted: there is room, and nobody waits for blocks or is being preempted."""
        return (
            self.open_count < self._max_num_seqs
            and self._unmet == 0
            and not any(reason is CloseReason.PREEMPTED for _, reason in self._closing.values())
        )

    def blocks_wanted(self) -> int:
        """Returns how many blocks the lease should ask for now."""
        rooms = (sequence.room - sequence.scheduled for sequence in self._running.values())
        return self.lease.shortfall(rooms, self.stats.step_count)

    def start(self, sequence: Sequence, admission: Admission) -> None:
        """Takes in an admitted sequence; it is part of the next step."""
        self._open(sequence, admission)
        self._shortage.admitted(sequence, len(sequence.blocks) - admission.cached_token_count // self._block_size)
        if sequence.begun_at == admission.cached_token_count:
            for source, destination in admission.copies:
                self._to_copy += (source, destination)

    def fork(self, source: int, samples: list[Sequence], fork: Fork) -> None:
        """Takes in samples whose tables were forked from another one; they are part of the next step.

        Args:
            source: the table that was forked. Nobody has written behind the fork; it may be closing by now.
            samples: one for each table of the fork, in order; all their tokens but the last are shared.
            fork: what the memory service says.
        """
        for sample, table in zip(samples, fork.tables, strict=True):
            self._open(sample, Admission(fork.epoch, table, fork.block_ids, fork.token_count, []))
            sample.reported = fork.token_count
        if not fork.token_count % self._block_size:
            return
        self._tails.forked(source, fork.tables, fork.block_ids[-1], must_copy=fork.must_copy)
        if source not in self._running:
            self._leave_tail(source)
        for table in (source, *fork.tables):
            if self._tails.must_copy(table):
                # `_grow` sees to it that the next token goes to a block of its own.
                self._running[table].room = self._running[table].scheduled

    def _open(self, sequence: Sequence, admission: Admission) -> None:
        """Has a sequence run on a new table."""
        if admission.table in self._running or admission.table in self._closing:
            raise InvariantError(f"table {admission.table} was granted twice in epoch {admission.epoch}")
        self._admission_no += 1
        sequence.take_table(admission, self._admission_no, self._block_size, self.now)
        begun = admission.cached_token_count
        if sequence.preemption_count:
            begun = self.swapping.bring_back(sequence, admission, self._running.values())
        sequence.begin_at(begun)
        sequence.released = sequence.blocks.count(0) if self._window else 0
        moving = bool(admission.copies) or begun > admission.cached_token_count
        sequence.report_at = report_at(sequence, self._block_size, self._window, copying=moving)
        self._running[admission.table] = sequence
        if self._policy is SchedulingPolicy.PRIORITY:
            self._running = dict(sorted(self._running.items(), key=lambda item: place_in_step(item[1], self._policy)))
        self._to_add.append(sequence)

    def schedule(self) -> StepDraft:
        """Returns the next step; it is empty when there is nothing to do."""
        # What is preempted below may be part of this very step, so it is removed by the next one.
        draft = StepDraft(removed=self._to_remove, added=self._to_add, copies=self._to_copy)
        self._to_remove, self._to_add, self._to_copy = [], [], []
        self.swapping.begin(draft)
        budget, prefills = self._budget, []
        hungry: list[Sequence] = []
        sparing = self._shortage.lasts
        tables, counts = draft.scheduled_tables, draft.scheduled_counts
        for sequence in self._running.values():
            total = sequence.total
            if total >= sequence.total_limit:
                continue
            scheduled = sequence.scheduled
            if total - scheduled > 1:
                prefills.append(sequence)
            elif total > scheduled and budget:
                if scheduled == sequence.room and (sparing or not self._grow(sequence, draft)):
                    hungry.append(sequence)
                    continue
                tables.append(sequence.table)
                counts.append(1)
                # The step samples one more.
                sequence.scheduled = scheduled + 1
                sequence.total = total + 1
                budget -= 1
        if hungry and sparing:
            budget -= self._feed(hungry, budget, draft)
        filled = self._fill(prefills, budget, draft, hungry) if prefills else 0
        budget -= filled
        self._settle_unmet(hungry, prefills, computing=len(tables))
        if not draft:
            draft.removed, self._to_remove = self._to_remove, []
            self.swapping.begin(draft)
        if draft:
            self.swapping.planned(self._budget - budget, filled)
            self.stats.step_count += 1
            self.stats.scheduled_token_count += self._budget - budget
        return draft

    def _grow(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Takes a block for the next token, which has no slot of its own; returns whether there was one."""
        block = self.lease.take()
        if block is None:
            return False
        if self._tails.must_copy(sequence.table):
            self._copy_tail(sequence, block, draft)
            return True
        sequence.count_blocks(self.now)
        draft.appended += (sequence.table, len(sequence.blocks), block)
        sequence.blocks.append(block)
        sequence.room += self._block_size
        return True

    def _copy_tail(self, sequence: Sequence, block: int, draft: StepDraft) -> None:
        """Puts a copy in the place of a last block that others name too."""
        index = len(sequence.blocks) - 1
        draft.copies += (sequence.blocks[index], block)
        draft.replaced += (sequence.table, index, block)
        sequence.blocks[index] = block
        sequence.room = len(sequence.blocks) * self._block_size
        # The shared block is held for the copy until the memory service hears of the first write.
        sequence.report_at = min(sequence.report_at, sequence.scheduled + 1)
        self._leave_tail(sequence.table)

    def _leave_tail(self, table: int) -> None:
        """Notes that a table shares its last block no more; who is left alone with it may write there."""
        alone = self._running.get(self._tails.left(table))
        if alone is not None:
            alone.room = len(alone.blocks) * self._block_size

    def _feed(self, hungry: list[Sequence], budget: int, draft: StepDraft) -> int:
        """Lets some of `hungry` go on, as many as there are blocks that may be spent; leaves the others in it.

        Returns:
            Tokens planned.
        """
        shortage = self._shortage
        # The longest gives back most at its end; but the first goes on whatever happens.
        hungry[1:] = sorted(hungry[1:], key=lambda sequence: -len(sequence.blocks))
        count = min(len(hungry), len(self.lease), budget, max(0, shortage.growth(len(draft.scheduled_tables))))
        shortage.grown(count)
        for sequence in hungry[:count]:
            # Who was left alone with a shared block by one before it goes on in that.
            if sequence.scheduled == sequence.room:
                self._grow(sequence, draft)
            draft.scheduled_tables.append(sequence.table)
            draft.scheduled_counts.append(1)
            sequence.scheduled += 1
            sequence.total += 1
        del hungry[:count]
        return count

    def _fill(self, prefills: list[Sequence], budget: int, draft: StepDraft, hungry: list[Sequence]) -> int:
        """Plans chunks of `prefills`, the first first; returns the tokens planned. Who has no block joins `hungry`."""
        tables, counts = draft.scheduled_tables, draft.scheduled_counts
        before = budget
        alone = len(prefills) + len(tables) == 1
        longest = budget if alone else min(budget, self._longest_chunk)
        for sequence in prefills:
            if budget == 0:
                break
            count = min(sequence.total - sequence.scheduled, budget, longest)
            if sequence.request.wants_prompt_logprobs:
                # Each of these tokens has a row of logits.
                count = min(count, LOGPROB_CHUNK)
            if sequence.scheduled + count > sequence.room:
                count = self._grow_chunk(sequence, count, draft)
                if not count:
                    hungry.append(sequence)
                    continue
            tables.append(sequence.table)
            counts.append(count)
            sequence.scheduled += count
            if sequence.scheduled == sequence.total:
                sequence.total += 1
            budget -= count
        return before - budget

    def _settle_unmet(self, hungry: list[Sequence], prefills: list[Sequence], computing: int) -> None:
        """Notes who sits the step out for want of a block, and preempts if waiting does not help.

        Args:
            hungry: who sits out.
            prefills: who computes a prompt.
            computing: sequences that take part.
        """
        self._unmet = unmet = len(hungry)
        self.stats.stalled_count += unmet
        self.lease.sparing = sparing = self._shortage.lasts
        demand = min(unmet, max(0, self._shortage.growth(computing))) if sparing else unmet
        self.lease.note_demand(self.lease.demand_ahead(demand, prefills, self._budget) if self._window else demand)
        if not unmet or not self.lease.exhausted:
            return
        if not computing:
            self._make_room(min(unmet, SPARING))
        elif self._policy is SchedulingPolicy.PRIORITY:
            last = max(self._running.values(), key=lambda sequence: place_in_step(sequence, self._policy))
            self._make_room(sum(s.request.settings.priority < last.request.settings.priority for s in hungry))

    def _grow_chunk(self, sequence: Sequence, count: int, draft: StepDraft) -> int:
        """Takes blocks for the next `count` tokens of a prompt, as far as the lease goes; returns for how many it does.

        Only where a window slides: elsewhere an admission brings the blocks of the whole prompt.
        """
        while sequence.scheduled + count > sequence.room and self._grow(sequence, draft):
            pass
        return min(count, sequence.room - sequence.scheduled)

    def _make_room(self, needed: int) -> None:
        """Preempts until `needed` blocks are on their way back, or nobody but the earliest sequence is left.

        Who sits out keeps what is computed, and others may end meanwhile: nobody is preempted for the sake of its
        equals while somebody computes. Blocks of tables that are closing already count: forgetting them preempts
        everyone, one after the other.
        """
        coming = sum(sequence.held_block_count for sequence, _ in self._closing.values())
        while coming < needed:
            victim = choose_victim(self._running.values(), self._max_preemptions, self._policy, self._block_size)
            if victim is None:
                return
            coming += victim.held_block_count
            self._preempt(victim)

    def _preempt(self, victim: Sequence) -> None:
        """Has a sequence give way."""
        victim.preemption_count += 1
        self.stats.preemption_count += 1
        if self.swapping.move_out(victim, self._running.values()):
            # What it gives up is in host memory: nobody need spare it.
            self._shortage.returned(victim.held_block_count)
        elif not victim.held:
            self._shortage.preempted(victim)
        self._close(victim, CloseReason.PREEMPTED)

    def yield_held(self) -> bool:
        """Preempts the last of those that are held, if there is one: when only they run, and somebody waits."""
        if (victim := last_held(self._running.values(), self._policy)) is not None:
            self._preempt(victim)
        return victim is not None

    def _close(self, sequence: Sequence, reason: CloseReason) -> None:
        """Stops scheduling a sequence and has its table fenced by the next step."""
        del self._running[sequence.table]
        sequence.state = SequenceState.CLOSING
        self._leave_tail(sequence.table)
        self._closing[sequence.table] = (sequence, reason)
        self._to_remove.append(sequence.table)
        if sequence in self._to_add:
            # The executor has not heard of it: it acknowledges the removal of a table that it does not know.
            self._to_add.remove(sequence)
            self.swapping.release(sequence)
        elif reason is not CloseReason.FAILED:
            self.swapping.rescue(sequence, self._running.values())

    def finish(self, sequence: Sequence, reason: CloseReason) -> None:
        """Ends a sequence; a no-op for one that has no table here or is ending already.

        A sequence that ends while it is being preempted is not queued again, and one that waits leaves host memory.
        """
        if sequence.state is SequenceState.WAITING:
            self.swapping.release(sequence)
        if self._find(sequence.table) is not sequence:
            return
        if sequence.state is SequenceState.RUNNING:
            self._close(sequence, reason)
        elif sequence.state is SequenceState.CLOSING and self._closing[sequence.table][1] is CloseReason.PREEMPTED:
            self._closing[sequence.table] = (sequence, reason)

    def update(self, outcome: StepOutcome) -> Update:
        """Takes in the result of a step."""
        journal = JournalEntry(self.pool.pool_id, self.pool.epoch)
        update = Update(journal)
        running = self._running
        for table, token in zip(outcome.sampled_tables, outcome.sampled_tokens, strict=True):
            sequence = running.get(table) or self._find(table)
            if sequence is None or sequence.ended:
                continue
            sequence.tokens.append(token)
            update.tokens.append((sequence, token))
        if outcome.sibling_tables:
            update.siblings = take_first_tokens(outcome, self._find)
            update.tokens += [(sample, sample.tokens[-1]) for _, samples in update.siblings for sample in samples]
        if outcome.logprobs:
            update.logprobs = assign_logprobs(outcome, self._find, update.siblings)
        for table, count in zip(outcome.written_tables, outcome.written_counts, strict=True):
            sequence = running.get(table) or self._find(table)
            if sequence is None:
                continue
            sequence.computed = count
            if count >= sequence.report_at:
                self._report(sequence, update)
        for sequence in self.swapping.land(outcome):
            if running.get(sequence.table) is sequence:
                self._report(sequence, update)
        for table, reason, message in outcome.errors:
            self._fail(table, reason, message, update)
        for table in outcome.fenced:
            self._fenced(table, update)
        return update

    def _report(self, sequence: Sequence, update: Update) -> None:
        """Adds a sequence to the journal, and notes when it is next to be heard of."""
        report(sequence, update.journal)
        update.reported.append(sequence)
        written = update.journal.written_counts[-1]
        sequence.note_stored(written, self._block_size)
        if self._window:
            self._release(sequence, written)
        sequence.report_at = report_at(sequence, self._block_size, self._window)

    def _release(self, sequence: Sequence, written: int) -> None:
        """Makes those entries null that the memory service will on reading the row with `written`."""
        outside = outside_block_count(written, self._window, self._block_size)
        if outside > sequence.released:
            sequence.count_blocks(self.now)
            sequence.release(outside)
            self.lease.exhausted = False

    def holds(self, sequence: Sequence) -> bool:
        """Whether a sequence has its table here."""
        return self._find(sequence.table) is sequence

    def _find(self, table: int) -> Sequence | None:
        """Returns the sequence of a table, closing ones included."""
        return self._running.get(table) or self._closing.get(table, (None, None))[0]

    def _fail(self, table: int, reason: str, message: str, update: Update) -> None:
        """The executor has dropped a sequence; that is a fence."""
        sequence = self._find(table)
        if sequence is None:
            return
        if table in self._running:
            self._close(sequence, CloseReason.FAILED)
            self._to_remove.remove(table)
        else:
            self._closing[table] = (sequence, CloseReason.FAILED)
        self._fenced(table, update)
        update.failed.append((sequence, reason, message))

    def _fenced(self, table: int, update: Update) -> None:
        """Nothing writes to a table any more: it can be closed."""
        sequence, reason = self._closing.pop(table, (None, CloseReason.FINISHED))
        if sequence is None:
            return
        if reason is not CloseReason.FAILED:
            # What is in the last block can be matched once its table is closed.
            report(sequence, update.journal)
            update.reported.append(sequence)
        swapped = reason is CloseReason.PREEMPTED and self.swapping.settle(sequence)
        update.journal.closed.append(table)
        update.journal.close_reasons.append(CloseReason.SWAPPED if swapped else reason)
        self.lease.exhausted = False
        if reason is not CloseReason.PREEMPTED:
            self._shortage.returned(len(sequence.blocks))
            self.swapping.release(sequence)
        sequence.count_blocks(self.now)
        sequence.clear_table()
        if reason is CloseReason.PREEMPTED:
            sequence.state = SequenceState.WAITING
            update.requeued.append(sequence)
        else:
            sequence.state = SequenceState.FINISHED
            update.released.append(sequence)

    def abandon(self) -> tuple[list[Sequence], list[Sequence]]:
        """Gives up every table, which are void or will be fenced by someone else.

        Returns:
            Sequences to queue again, in order of admission, and those that only waited for their fence.
        """
        requeued, released = [], []
        for sequence in self.sequences():
            closing = self._closing.get(sequence.table)
            if sequence.ended or (closing is not None and closing[1] is not CloseReason.PREEMPTED):
                sequence.state = SequenceState.FINISHED
                released.append(sequence)
            else:
                sequence.state = SequenceState.WAITING
                if closing is None:
                    sequence.preemption_count += 1
                requeued.append(sequence)
            sequence.count_blocks(self.now)
            sequence.clear_table()
            sequence.stayed_token_count = sequence.lost_token_count
        self.swapping.abandon()
        self._running.clear()
        self._closing.clear()
        self._to_add, self._to_copy, self._to_remove = [], [], []
        self._shortage = Shortage()
        self._tails.clear()
        return requeued, released
