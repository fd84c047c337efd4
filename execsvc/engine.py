"""The executor's core: applies step plans, one after the other, from one thread.

A plan is applied in the order removed, added, appended, swap_out, copies, swap_in, swap_freed, scheduled. What is
malformed as a whole is refused before anything changes; what is wrong with one sequence fails that sequence, names why
in `errors`, and drops it.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from execsvc.grammars import Grammars, Matcher
from execsvc.kv_cache import KVCache
from execsvc.sampler import SamplingSpec
from execsvc.sampling_params import check_columns, report_logprobs, sampling_spec
from execsvc.sequences import Sequence, SequenceRows
from execsvc.steps import LaunchedStep, Observe, Steps
from execsvc.swap import SwapSpace
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import (
    InvalidRequestError,
    QuireError,
    SequenceExistsError,
    SequenceNotFoundError,
    StaleEpochError,
    UnsupportedError,
)
from quire.units import div_ceil
from quire.window import outside_block_count

_NO_OWNER = 0
_SIBLING_LIMIT = 1024


@dataclasses.dataclass(slots=True)
class PendingStep:
    """A plan that was applied, and whose tokens are not taken yet."""

    step: int
    fenced: bytes
    errors: dict[int, QuireError]
    launched: LaunchedStep
    swap_refused: list[int] = dataclasses.field(default_factory=list)
    swap_slots_elsewhere: int = 0

    @property
    def deferred(self) -> bool:
        """Whether there may be anything to wait for."""
        return self.launched.deferred

    def wait(self) -> None:
        """Waits until the device is done with it. Any thread may wait."""
        self.launched.wait()


class Engine:
    """Sequences, KV cache and model of one device. Not thread-safe: one caller.

    A plan is applied by `submit` and answered by `collect`, in the same order. The next plan may be submitted before
    the last one is collected; its decodes go on from tokens that only the device knows yet.

    Args:
        steps: computes.
        cache: the KV cache that `steps` uses.
        max_num_seqs: most sequences open at once.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: longest sequence in tokens.
        swap_slot_count: blocks that host memory is set aside for.
    """

    def __init__(
        self,
        steps: Steps,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        swap_slot_count: int = 0,
    ) -> None:
        self._steps = steps
        self._cache = cache
        self._rows = SequenceRows(max_num_seqs, max_model_len, cache.layout.block_size, steps.row_observer)
        self.vocab_size = steps.config.vocab_size
        self.window = steps.config.sliding_window
        self.block_size = cache.layout.block_size
        self.block_count = cache.layout.block_count
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._swap = SwapSpace(cache, swap_slot_count)
        self.epoch = 0
        self.grammars: Grammars | None = None
        """Grammars for the model's tokens, where its tokenizer is known."""
        self.observe_logits: Observe | None = None
        """Called with (tables, logits) before sampling: for tests that compare logits."""

    @property
    def open_tables(self) -> list[int]:
        """Tables of the sequences that are open."""
        return list(self._rows.by_table)

    def begin_epoch(self, epoch: int) -> None:
        """Drops every sequence of an older epoch and refuses plans that carry one. Never goes back."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._rows.drop_all()
            self._swap.forget()

    def drop_owner(self, owner: int) -> None:
        """Drops the sequences of one stream."""
        self._rows.drop_owner(owner)
        self._swap.forget(owner)

    @property
    def swap_slot_count(self) -> int:
        """Blocks that can be swapped out at once."""
        return self._swap.slot_count

    def measure_swap(self) -> tuple[int, int]:
        """Returns the bytes a second that blocks are swapped out and in with; see `SwapSpace.measure`."""
        return self._swap.measure()

    def drop_all(self) -> None:
        """Drops every sequence."""
        self._rows.drop_all()

    def calculate_kv_scales(self) -> None:
        """Lets the next step's keys and values decide the scales of a float8 cache. Nothing must be cached yet."""
        self._steps.calculate_kv_scales()

    def settle(self) -> None:
        """Returns when nothing that was submitted can write any more."""
        self._steps.synchronize()

    def reset(self, used_block_count: int) -> None:
        """Forgets what was run, as if just made: sequences, epoch, and the content of blocks below the count given."""
        self._steps.synchronize()
        self._rows.drop_all()
        self._cache.data[:used_block_count].zero_()
        self.epoch = 0

    def apply(self, plan: pb.StepPlan, owner: int = _NO_OWNER) -> pb.StepResult:
        """Applies one plan and returns what it did; raises as `submit`."""
        pending = self.submit(plan, owner)
        pending.wait()
        return self.collect(pending)

    def submit(self, plan: pb.StepPlan, owner: int = _NO_OWNER) -> PendingStep:
        """Applies one plan and begins to compute it.

        Args:
            plan: the step.
            owner: stream that sends it; it can name only tables that it added itself.

        Raises:
            StaleEpochError: the plan is of another epoch.
            InvalidRequestError: a column is malformed; nothing was changed.
        """
        if plan.epoch != self.epoch:
            raise StaleEpochError(f"epoch: the plan is of epoch {plan.epoch}, the executor is in {self.epoch}")
        step = _Step(plan, self.block_count, self.max_num_batched_tokens)
        if step.moves:
            self._swap.check(step.swap_out, step.swap_in, step.copies, owner)
        errors: dict[int, QuireError] = {}
        for table in step.removed:
            if self._owned(table, owner) is not None:
                self._rows.drop(table)
        for start in plan.added:
            self._attempt(start.table, errors, functools.partial(self._add, start, owner))
        self._append(step.appended, owner, errors)
        refused = self._swap.move_out(step.swap_out, owner) if step.moves else []
        if step.copies.size:
            self._steps.copy_blocks(step.copies)
        if step.moves:
            self._swap.move_in(step.swap_in, owner)
            self._swap.free(step.swap_freed, owner)
        scheduled = self._schedule(step, owner, errors)
        if scheduled:
            launched = self._steps.launch(self._rows, scheduled, self.observe_logits)
            self._note_launch(launched)
        else:
            launched = self._steps.mark()
        elsewhere = self._swap.held_elsewhere(owner)
        return PendingStep(plan.step, plan.removed, errors, launched, refused, elsewhere)

    def collect(self, pending: PendingStep) -> pb.StepResult:
        """Returns what a plan did; call after `pending.wait()`, once, in the order of the plans."""
        launched, errors = pending.launched, pending.errors
        result = pb.StepResult(step=pending.step, fenced=pending.fenced)
        samplers = [launched.sequences[index] for index in launched.sampled]
        tokens = launched.tokens()
        rows = [sequence.row for sequence in samplers if sequence.open]
        if len(rows) == len(samplers) and min(tokens, default=0) >= 0:
            self._rows.last_token[rows] = tokens
        else:
            samplers, tokens = self._store_tokens(samplers, tokens, errors)
        written = [sequence.table for sequence in launched.sequences]
        lens = launched.lens
        if errors:
            lens = [length for table, length in zip(written, lens, strict=True) if table not in errors]
            written = [table for table in written if table not in errors]
        result.written_tables, result.written_counts = columns.pack(written), columns.pack(lens)
        result.sampled_tables = columns.pack([sequence.table for sequence in samplers])
        result.sampled_tokens = columns.pack(tokens)
        if launched.siblings:
            _add_siblings(result, launched, errors)
        report_logprobs(launched.logprobs, errors, result)
        if pending.swap_refused:
            result.swap_refused = columns.pack(pending.swap_refused)
        result.swap_slots_elsewhere = pending.swap_slots_elsewhere
        result.model_ns, result.sample_ns = launched.durations()
        result.errors.extend(
            pb.SequenceError(table=table, reason=error.reason, message=error.message) for table, error in errors.items()
        )
        return result

    def _store_tokens(
        self, samplers: list[Sequence], tokens: list[int], errors: dict[int, QuireError]
    ) -> tuple[list[Sequence], list[int]]:
        """Keeps the last tokens of sequences of which some are dropped or fail now; returns those that count."""
        good: list[tuple[Sequence, int]] = []
        for sequence, token in zip(samplers, tokens, strict=True):
            if sequence.failed:
                message = f"table {sequence.table} failed in a step before"
                errors.setdefault(sequence.table, SequenceNotFoundError(message))
            elif token < 0:
                message = f"the logits of table {sequence.table} are not finite"
                self._fail_sequence(sequence, QuireError(message, reason="LOGITS_NOT_FINITE"), errors)
            else:
                if sequence.open:
                    self._rows.last_token[sequence.row] = token
                good.append((sequence, token))
        return [sequence for sequence, _ in good], [token for _, token in good]

    def _note_launch(self, launched: LaunchedStep) -> None:
        """Brings the rows to where they are after the step, with tokens known that are still to come."""
        rows = self._rows
        row_ids = np.array([sequence.row for sequence in launched.sequences])
        rows.computed[row_ids] = launched.lens
        if self.window:
            rows.release_outside(row_ids, self.window)
        rows.known[row_ids[launched.sampled]] += 1

    def _owned(self, table: int, owner: int) -> Sequence | None:
        """Returns the open sequence of `table` if `owner` added it."""
        sequence = self._rows.by_table.get(table)
        return sequence if sequence is not None and sequence.owner == owner else None

    def _attempt(self, table: int, errors: dict[int, QuireError], action: Callable[[], None]) -> None:
        """Runs `action`; what it raises fails `table` alone."""
        try:
            action()
        except QuireError as error:
            self._fail(table, error, errors)

    def _fail(self, table: int, error: QuireError, errors: dict[int, QuireError]) -> None:
        """Drops the open sequence of a table and keeps why. The first cause stays."""
        sequence = self._rows.by_table.get(table)
        if sequence is not None:
            sequence.failed = True
            self._rows.drop(table)
        errors.setdefault(table, error)

    def _fail_sequence(self, sequence: Sequence, error: QuireError, errors: dict[int, QuireError]) -> None:
        """As `_fail`, for a sequence that may have been dropped since its step was launched."""
        if sequence.open:
            self._fail(sequence.table, error, errors)
        else:
            sequence.failed = True
            errors.setdefault(sequence.table, error)

    def _add(self, start: pb.SequenceStart, owner: int) -> None:
        """Opens a sequence; raises QuireError if it cannot be."""
        rows = self._rows
        if start.table in rows.by_table:
            raise SequenceExistsError(f"added: table {start.table} is open already")
        if rows.full:
            raise InvalidRequestError(f"added: {rows.row_count} sequences are open, the most that may be")
        tokens = columns.unpack(start.token_ids, "token_ids")
        blocks = columns.unpack(start.block_ids, "block_ids")
        computed = start.computed_token_count
        if not 1 <= len(tokens) <= rows.max_model_len:
            raise InvalidRequestError(f"token_ids: {len(tokens)} tokens, allowed is 1 .. {rows.max_model_len}")
        if int(tokens.max()) >= self.vocab_size:
            raise InvalidRequestError(f"token_ids: {int(tokens.max())} is not below the vocabulary, {self.vocab_size}")
        if computed >= len(tokens):
            raise InvalidRequestError(
                f"computed_token_count: {computed} of {len(tokens)} tokens: at least one must be left to compute"
            )
        if not div_ceil(computed, rows.block_size) <= len(blocks) <= rows.block_max:
            raise InvalidRequestError(
                f"block_ids: {len(blocks)} blocks for {computed} computed tokens, at most {rows.block_max}"
            )
        self._check_blocks(blocks, outside_block_count(computed, self.window, rows.block_size))
        if len(start.sibling_seeds) > _SIBLING_LIMIT:
            message = f"sibling_seeds: found {len(start.sibling_seeds)}, allowed are 0 .. {_SIBLING_LIMIT}"
            raise InvalidRequestError(message, field="sibling_seeds")
        sampling = sampling_spec(start.sampling, self.vocab_size)
        matcher = self._matcher(sampling, tokens)
        rows.add(start.table, owner, tokens, blocks, computed, sampling, tuple(start.sibling_seeds), matcher)

    def _matcher(self, sampling: SamplingSpec, tokens: columns.Column) -> Matcher | None:
        """Returns where a sequence is in its grammar, None if it has none; raises InvalidRequestError."""
        if not sampling.grammar:
            return None
        if self.grammars is None:
            raise UnsupportedError("grammar: the model's tokenizer is not known here", field="grammar")
        return self.grammars.matcher(sampling.grammar, tokens[sampling.prompt_token_count :].tolist())

    def _check_blocks(self, blocks: columns.Column, outside: int) -> None:
        """Raises InvalidRequestError if a block is beyond the pool, or null and not among the first `outside`.

        Those lie outside the sliding window of the first token to compute.
        """
        count = self.block_count
        if len(blocks) and not (blocks[outside:].all() and int(blocks.max()) < count):
            wrong = next(int(block) for index, block in enumerate(blocks) if not int(index >= outside) <= block < count)
            raise InvalidRequestError(f"block_ids: block {wrong} is out of range, allowed is 1 .. {count - 1}")

    def _append(self, triples: columns.Column, owner: int, errors: dict[int, QuireError]) -> None:
        """Sets table entries: table[index] = block. Tables that are not open are passed over: they failed before."""
        for table, index, block in triples.reshape(-1, 3).tolist():
            sequence = self._owned(table, owner)
            if sequence is None:
                continue
            try:
                self._set_entry(sequence, index, block)
            except QuireError as error:
                self._fail(table, error, errors)

    def _set_entry(self, sequence: Sequence, index: int, block: int) -> None:
        """Sets one entry of a block table; raises InvalidRequestError if it does not fit."""
        rows = self._rows
        count = int(rows.block_counts[sequence.row])
        if index > count or index >= rows.block_max:
            raise InvalidRequestError(
                f"appended: index {index} of table {sequence.table}, which has {count} of at most {rows.block_max}"
            )
        if not 1 <= block < self.block_count:
            raise InvalidRequestError(
                f"appended: block {block} is out of range, allowed is 1 .. {self.block_count - 1}"
            )
        rows.set_entry(sequence.row, index, block)

    def _schedule(self, step: _Step, owner: int, errors: dict[int, QuireError]) -> list[tuple[Sequence, int]]:
        """Returns what is to be computed; what cannot be fails."""
        rows, by_table = self._rows, self._rows.by_table
        scheduled: list[tuple[Sequence, int]] = []
        for table, count in zip(step.scheduled_tables, step.scheduled_counts, strict=True):
            sequence = by_table.get(table)
            if sequence is None or sequence.owner != owner:
                errors.setdefault(table, SequenceNotFoundError(f"scheduled_tables: table {table} is not open"))
            else:
                scheduled.append((sequence, count))
        row_ids = np.array([sequence.row for sequence, _ in scheduled], dtype=np.int64)
        ends = rows.computed[row_ids] + np.array([count for _, count in scheduled], dtype=np.int64)
        known, slots = rows.known[row_ids], rows.block_counts[row_ids] * rows.block_size
        beyond = np.flatnonzero(ends > np.minimum(known, slots)).tolist()
        for index in beyond:
            sequence, count = scheduled[index]
            message = (
                f"scheduled_counts: {count} tokens bring table {sequence.table} to {ends[index]}; "
                f"{known[index]} tokens are known and its blocks hold {slots[index]}"
            )
            self._fail(sequence.table, InvalidRequestError(message), errors)
        return [pair for pair in scheduled if pair[0].open] if beyond else scheduled


def _add_siblings(result: pb.StepResult, launched: LaunchedStep, errors: dict[int, QuireError]) -> None:
    """Adds the tokens drawn for siblings of sequences that have not failed."""
    siblings: list[tuple[int, int]] = []
    for place, tokens in launched.siblings.items():
        table = launched.sequences[launched.sampled[place]].table
        siblings += [(table, token) for token in tokens if table not in errors]
    result.sibling_tables = columns.pack([table for table, _ in siblings])
    result.sibling_tokens = columns.pack([token for _, token in siblings])


class _Step:
    """The columns of a plan, unpacked and checked as far as they can be without the state.

    Raises:
        InvalidRequestError: a column is malformed.
    """

    def __init__(self, plan: pb.StepPlan, block_count: int, max_num_batched_tokens: int) -> None:
        self.removed = columns.unpack_list(plan.removed, "removed")
        self.appended = columns.unpack(plan.appended, "appended", row_length=3)
        self.copies = _pairs(plan.copies, "copies")
        self.moves = bool(plan.swap_out or plan.swap_in or plan.swap_freed)
        """Whether there is anything in the next three."""
        if self.moves:
            self.swap_freed = columns.unpack_list(plan.swap_freed, "swap_freed")
            self.swap_out, self.swap_in = _pairs(plan.swap_out, "swap_out"), _pairs(plan.swap_in, "swap_in")
        self.scheduled_tables = columns.unpack_list(plan.scheduled_tables, "scheduled_tables")
        self.scheduled_counts = columns.unpack_list(
            plan.scheduled_counts, "scheduled_counts", row_count=len(self.scheduled_tables)
        )
        for start in plan.added:
            columns.unpack(start.token_ids, "token_ids")
            columns.unpack(start.block_ids, "block_ids")
            check_columns(start.sampling)
        self._check_copies(block_count)
        if len(set(self.scheduled_tables)) != len(self.scheduled_tables):
            raise InvalidRequestError("scheduled_tables: a table is there twice", field="scheduled_tables")
        if min(self.scheduled_counts, default=1) == 0:
            raise InvalidRequestError("scheduled_counts: a count is 0, at least 1 is needed", field="scheduled_counts")
        total = sum(self.scheduled_counts)
        if total > max_num_batched_tokens:
            raise InvalidRequestError(
                f"scheduled_counts: {total} tokens, a step may compute {max_num_batched_tokens}",
                field="scheduled_counts",
            )

    def _check_copies(self, block_count: int) -> None:
        """Raises InvalidRequestError if a copy names a block that is none, or copies depend on their order."""
        if not self.copies.size:
            return
        if int(self.copies.min()) < 1 or int(self.copies.max()) >= block_count:
            raise InvalidRequestError(f"copies: a block is out of range, allowed is 1 .. {block_count - 1}")
        sources, destinations = set(self.copies[:, 0].tolist()), self.copies[:, 1].tolist()
        if len(set(destinations)) != len(destinations) or sources & set(destinations):
            raise InvalidRequestError("copies: a block is the destination of two copies, or of one and source of one")


def _pairs(data: bytes, field: str) -> npt.NDArray[np.int64]:
    """Returns the pairs of a column; raises InvalidRequestError."""
    return columns.unpack(data, field, row_length=2).reshape(-1, 2).astype(np.int64)
