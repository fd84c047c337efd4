"""Steps on a device that works beside the host.

A step in which every sequence computes its last known token and samples the next one, a decode step, is a replay of
graphs captured for its padded size: the body (stage, forward, logits) and one of three tails (choose, advance), by what
the batch asks for. A second body reads prefixes that sequences share once for all of them, for steps in which that
pays. Any other step is launched piece by piece.

    host    one pinned buffer: what changed in the state, the rows of the batch, and for other steps their tokens
    device  apply changes -> body -> tail -> tokens and reports to pinned memory, event

The host never waits before the event, and knows lengths without tokens, so the next step can be launched meanwhile:
its input is the token that the device has noted itself. Only a grammar must know a token before it allows the next: its
masks are made between body and tail, while the device computes (`execsvc.gpu.masks`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog
import torch

from execsvc import events
from execsvc.batch import Arrangement, arrange
from execsvc.gpu.changes import ResidentChanges
from execsvc.gpu.decoder import Decoder
from execsvc.gpu.kv_scales import KVScales
from execsvc.gpu.ladder import ladder, rung_of_size
from execsvc.gpu.launched import Clock, Launched, Reports
from execsvc.gpu.masks import GrammarMasks
from execsvc.gpu.mixed_inputs import MixedInputs
from execsvc.gpu.operations import Operations, TritonOperations
from execsvc.gpu.resident import ResidentRows
from execsvc.gpu.runtime import Graph, Runtime, runtime_of
from execsvc.gpu.sampling import DeviceSampler, TritonSampler
from execsvc.gpu.siblings import SiblingDraws
from execsvc.gpu.staging import Returned, Staging, WordReturn
from execsvc.gpu.step_groups import StepGroups
from execsvc.kv_cache import KVCache
from execsvc.model.llama import Llama
from execsvc.prefix_tree import PrefixTree
from execsvc.sequences import Sequence, SequenceRows
from execsvc.steps import Observe
from kernels.sampling.tensors import REPORT_WORDS
from kernels.step_state.tensors import Staged

_STAGING_DEPTH: Final = 8
_PADDING: Final = 128
"""Words that go to the alignment of what is put into a buffer."""
_WRITE_ROOM: Final = 65536
"""Changes of the state that go with a step; more are sent in portions before it."""

log = structlog.get_logger(__name__)

Ints = npt.NDArray[np.int64]
Writes = tuple[torch.Tensor, torch.Tensor]
"""(offsets, values), both `[write]` int32, on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rung:
    """The graphs of one padded size."""

    body: Graph
    grouped_body: Graph | None
    """Body that reads shared prefixes once; None where there are no groups."""
    greedy_tail: Graph
    """For batches that take the most likely token everywhere."""
    tail: Graph
    """For batches that only draw."""
    full_tail: Graph
    """For all others: logits are changed, and reported of."""


class GpuSteps:
    """Launches steps of one model on one device. Implements `execsvc.steps.Steps`. One thread calls.

    Args:
        decoder: the model.
        cache: its KV cache.
        sampler: chooses tokens.
        runtime: the device.
        max_num_seqs: most sequences open at once.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: longest sequence in tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        sampler: DeviceSampler,
        runtime: Runtime,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self.config = decoder.model.config
        self._decoder, self._cache, self._sampler, self._runtime = decoder, cache, sampler, runtime
        self._block_size = cache.layout.block_size
        block_max = -(-max_model_len // self._block_size)
        vocab_size = self.config.vocab_size
        self._changes = ResidentChanges(max_num_seqs, vocab_size, max_model_len, runtime.device)
        self.row_observer = ResidentRows(max_num_seqs, block_max, self._changes, runtime.device)
        self._resident = self.row_observer.device_state
        self._max_num_seqs = max_num_seqs
        self._groups = self._prefix_groups(decoder.operations)
        group_words = 0 if self._groups is None else len(self._groups.columns.state)
        room = 2 * _WRITE_ROOM + 9 * max_num_seqs + 7 * max_num_batched_tokens + 2 * group_words + _PADDING
        self._staging = Staging(runtime, room, _STAGING_DEPTH)
        self._masks = GrammarMasks(runtime, max_num_seqs, vocab_size)
        self._returns = WordReturn(runtime, max_num_seqs)
        self._staged = Staged.allocate(max_num_seqs, block_max, runtime.device)
        self._clock = Clock()
        self._places = torch.arange(max_num_seqs, dtype=torch.int32, device=runtime.device)
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int32, device=runtime.device)
        self._reports = torch.zeros(max_num_seqs, REPORT_WORDS, dtype=torch.int32, device=runtime.device)
        self._logits = torch.empty(0, device=runtime.device)
        self._rungs: dict[int, Rung] = {}
        self._rung_of_size: list[int] = []
        self._outdated = False
        """Whether graphs hold constants that have changed."""

    def _prefix_groups(self, operations: Operations) -> StepGroups | None:
        """Returns what finds sequences that share a prefix, if the operations can make use of it."""
        if operations.groups is None:
            return None
        tree = PrefixTree(self.row_observer.tables, self._block_size, operations.group_rules)
        self.row_observer.prefixes = tree
        return StepGroups(tree, operations.groups, self._block_size)

    @torch.inference_mode()
    def capture(self, sizes: list[int] | None = None) -> None:
        """Captures the graphs, the largest first: the others then fit into the memory that it took.

        Args:
            sizes: batch sizes, ascending; None for the ladder of max_num_seqs. If it is empty, every step is launched
                piece by piece.
        """
        sizes = ladder(self._max_num_seqs) if sizes is None else sizes
        self._rungs = {}
        self._logits = torch.zeros(
            max(sizes, default=0),
            self.config.vocab_size,
            dtype=self._decoder.model.embeddings.dtype,
            device=self._runtime.device,
        )
        for size in reversed(sizes):
            self._rungs[size] = self._capture_rung(size)
        self._rung_of_size = rung_of_size(sizes)

    @property
    def sizes(self) -> list[int]:
        """The batch sizes that are captured, ascending."""
        return sorted(self._rungs)

    def _capture_rung(self, size: int) -> Rung:
        """Captures one size."""
        resident, rows = self._resident, self._staging.words[:size]
        staged, places, sampled = self._staged.head(size), self._places[:size], self._sampled[:size]
        logits, operations, decoder = self._logits[:size], self._decoder.operations, self._decoder

        def body(*, grouped: bool = False) -> None:
            def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
                return operations.attend_last(layer, q, staged.tables, staged.lens, grouped=grouped)

            operations.stage_decode(resident, rows, staged, self._block_size)
            hidden = decoder.hidden(staged.tokens, staged.positions, staged.slots, attend)
            logits.copy_(decoder.logits(hidden))

        def greedy_tail() -> None:
            self._sampler.most_likely(logits, sampled)
            operations.advance(resident, rows, staged.lens, sampled, places)

        def tail() -> None:
            self._sampler.sample(logits, staged.params, staged.lens, sampled)
            operations.advance(resident, rows, staged.lens, sampled, places)

        def full_tail() -> None:
            changes = self._changes.at(rows, self._masks.places[:size], self._masks.masks)
            self._sampler.sample_changed(logits, changes, staged.params, staged.lens, sampled, self._reports[:size])
            operations.advance(resident, rows, staged.lens, sampled, places)

        # Captured on padding: nothing is written to the cache and no row advances.
        self._staging.words[:size].fill_(-1)
        capture = self._runtime.capture
        grouped_body = None
        if self._groups is not None and size > 1:
            grouped_body = capture(functools.partial(body, grouped=True))
        return Rung(capture(body), grouped_body, capture(greedy_tail), capture(tail), capture(full_tail))

    @torch.inference_mode()
    def launch(
        self,
        rows: SequenceRows,
        scheduled: list[tuple[Sequence, int]],
        observe: Observe | None,
    ) -> Launched:
        """Launches a step and returns at once.

        Args:
            rows: the open sequences.
            scheduled: (sequence, token count) pairs, checked by the caller.
            observe: called with (tables, logits) of the sequences that sample.
        """
        started_ns = time.perf_counter_ns()
        scales = self._decoder.operations.scales
        if self._outdated:
            self.capture(self.sizes)
            self._outdated = False
        self._changes.send(self._staging)
        row_ids = np.array([sequence.row for sequence, _ in scheduled], dtype=np.int64)
        counts = np.array([count for _, count in scheduled], dtype=np.int64)
        computed = rows.computed[row_ids]
        decodes = (counts == 1) & (computed + 1 == rows.known[row_ids]) & ~rows.has_siblings[row_ids]
        if len(scheduled) < len(self._rung_of_size) and decodes.all() and not scales.measuring:
            return self._launch_decode(rows, [sequence for sequence, _ in scheduled], row_ids, observe, started_ns)
        launched = self._launch_mixed(rows, arrange(rows, scheduled), observe, started_ns)
        if scales.measuring:
            scales.finish()
            self._outdated = True
            log.info(events.KV_SCALES_CHOSEN, **scales.described())
        return launched

    def calculate_kv_scales(self) -> None:
        """See Steps. Graphs hold scales as constants: they are captured anew before the step after that one."""
        self._decoder.operations.scales.measuring = True

    def mark(self) -> Launched:
        """Returns a step that computes nothing and is done when all that was launched before it is."""
        started_ns = time.perf_counter_ns()
        return Launched([], [], [], self._returns.send(self._sampled[:0]), self._clock, started_ns)

    @torch.inference_mode()
    def copy_blocks(self, pairs: Ints) -> None:
        """See Steps."""
        most = self._staging.size // 2
        for first in range(0, len(pairs), most):
            self._staging.begin()
            words = self._staging.put(pairs[first : first + most].ravel())
            self._staging.send()
            self._cache.copy_blocks(words.view(-1, 2).long())

    def synchronize(self) -> None:
        """Waits until nothing that was launched can write any more."""
        self._runtime.synchronize()

    def _launch_decode(
        self, rows: SequenceRows, sequences: list[Sequence], row_ids: Ints, observe: Observe | None, started_ns: int
    ) -> Launched:
        """Replays the graphs of the padded size."""
        count = len(sequences)
        size = self._rung_of_size[count]
        rung = self._rungs[size]
        offsets, values = self._take_writes()
        self._staging.begin()
        self._staging.put(row_ids, size, fill=-1)
        writes = self._put_writes(offsets, values)
        grouped, group_writes = self._put_groups(rows, row_ids)
        self._staging.send()
        self._apply(writes, group_writes)
        (rung.grouped_body if grouped and rung.grouped_body is not None else rung.body).replay()
        if observe is not None:
            observe([sequence.table for sequence in sequences], self._logits[:count])
        self._tail(rung, rows, sequences, row_ids).replay()
        reports = Reports.of_samples(rows, sequences, row_ids)
        parts = [self._sampled[:count]] if reports is None else [self._sampled[:count], self._reports[:count]]
        returned = self._returns.send(*parts)
        _note_unread(rows, sequences, row_ids, returned)
        lens = (rows.computed[row_ids] + 1).tolist()
        return Launched(sequences, lens, list(range(count)), returned, self._clock, started_ns, reports=reports)

    def _tail(self, rung: Rung, rows: SequenceRows, sequences: list[Sequence], row_ids: Ints) -> Graph:
        """Returns the tail that a batch needs, with all that it reads on its way."""
        if _takes_more(rows, row_ids):
            self._masks.send(sequences, np.flatnonzero(rows.constrained[row_ids]).tolist())
            return rung.full_tail
        return rung.tail if rows.draws[row_ids].any() else rung.greedy_tail

    def _launch_mixed(
        self, rows: SequenceRows, plan: Arrangement, observe: Observe | None, started_ns: int
    ) -> Launched:
        """Launches a step with chunks of prompts, or with draws for siblings, piece by piece."""
        samplers = [plan.sequences[index] for index in plan.sampled]
        row_ids, sampled = plan.row_ids[plan.sampled], self._sampled[: len(samplers)]
        prompts = Reports.of_prompts(plan, 0) if plan.reported else None
        staged, grouped = self._stage_mixed(rows, plan, prompts)
        hidden = self._forward_mixed(plan, staged, grouped=grouped)
        reports = Reports.of_samples(rows, samplers, row_ids)
        siblings = SiblingDraws.take(rows, samplers, row_ids)
        tokens, blocks = [sampled], [] if reports is None else [self._reports[: len(samplers)]]
        if samplers:
            logits = self._decoder.logits(hidden.index_select(0, staged.sampled_rows))
            if observe is not None:
                observe([sequence.table for sequence in samplers], logits)
            params = self._resident.params.index_select(1, staged.sampling_rows)
            full = siblings is not None or _takes_more(rows, row_ids)
            changed = self._choose_mixed(rows, samplers, row_ids, logits, params, staged, full=full)
        self._decoder.operations.advance(self._resident, staged.batch_rows, staged.lens, sampled, staged.places)
        prompt_block = self._report_prompts(hidden, staged)
        # Siblings come last: the buffer that brings their seeds takes the place of this step's.
        if siblings is not None:
            drawn, block = siblings.draw(self._sampler, self._staging, logits, changed, params, self._max_num_seqs)
            tokens.append(drawn)
            if reports is not None:
                blocks.append(block)
                reports = siblings.join(reports, rows, samplers, row_ids)
        if prompts is not None:
            first = sum(len(block) for block in blocks)
            prompts = dataclasses.replace(prompts, places=first + prompts.places)
            reports = prompts if reports is None else Reports.joined([reports, prompts])
            blocks.append(prompt_block)
        returned = self._returns.send(*tokens, *blocks)
        _note_unread(rows, samplers, row_ids, returned)
        places = [] if siblings is None else siblings.places.tolist()
        lens = plan.context_lens.tolist()
        return Launched(plan.sequences, lens, plan.sampled, returned, self._clock, started_ns, places, reports)

    def _stage_mixed(self, rows: SequenceRows, plan: Arrangement, prompts: Reports | None) -> tuple[MixedInputs, bool]:
        """Brings what a step needs to the device; says whether it is worth to read shared prefixes once."""
        staging, split = self._staging, plan.decode_count
        offsets, values = self._take_writes()
        places = np.full(len(plan.sequences), -1)
        places[plan.sampled] = np.arange(len(plan.sampled))
        none = np.empty(0, dtype=np.int64)
        staging.begin()
        staged = MixedInputs(
            batch_rows=staging.put(plan.row_ids),
            lens=staging.put(plan.context_lens),
            starts=staging.put(plan.query_starts[split:] - split),
            places=staging.put(places),
            sampled_rows=staging.put(plan.query_starts[1:][plan.sampled] - 1),
            sampled_lens=staging.put(plan.context_lens[plan.sampled]),
            sampling_rows=staging.put(plan.row_ids[plan.sampled]),
            # What the device alone may know yet, the last token of a sequence that decodes, is taken from its state.
            tokens=staging.put(np.where(plan.last_known, -1, plan.tokens)),
            token_rows=staging.put(plan.row_ids[plan.owners]),
            positions=staging.put(plan.positions),
            slots=staging.put(plan.slots),
            prompt_rows=staging.put(plan.logit_rows[len(plan.sampled) :]),
            prompt_tokens=staging.put(none if prompts is None else prompts.tokens),
            prompt_counts=staging.put(none if prompts is None else prompts.counts),
        )
        writes = self._put_writes(offsets, values)
        grouped, group_writes = self._put_groups(rows, plan.row_ids[:split])
        staging.send()
        self._apply(writes, group_writes)
        return staged, grouped

    def _forward_mixed(self, plan: Arrangement, staged: MixedInputs, *, grouped: bool) -> torch.Tensor:
        """Returns the hidden states of all tokens of a step, `[token, hidden_size]`."""
        operations, resident, split = self._decoder.operations, self._resident, plan.decode_count
        tokens, lens = staged.tokens, staged.lens
        inputs = torch.where(tokens < 0, resident.tokens.index_select(0, staged.token_rows), tokens).long()
        tables = resident.tables.index_select(0, staged.batch_rows)
        longest = int((plan.query_starts[1:] - plan.query_starts[:-1]).max(initial=0))

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            parts = []
            if split:
                parts.append(operations.attend_last(layer, q[:split], tables[:split], lens[:split], grouped=grouped))
            if len(q) > split:
                chunks = operations.attend_chunks(
                    layer, q[split:], tables[split:], lens[split:], staged.starts, longest
                )
                parts.append(chunks)
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return self._decoder.hidden(inputs, staged.positions.long(), staged.slots.long(), attend)

    def _choose_mixed(
        self,
        rows: SequenceRows,
        samplers: list[Sequence],
        row_ids: Ints,
        logits: torch.Tensor,
        params: torch.Tensor,
        staged: MixedInputs,
        *,
        full: bool,
    ) -> torch.Tensor:
        """Chooses the tokens of a step and returns the logits that they were chosen from. Writes `_sampled`."""
        sampled = self._sampled[: len(samplers)]
        if full:
            self._masks.send(samplers, np.flatnonzero(rows.constrained[row_ids]).tolist())
            masks = self._masks
            changes = self._changes.at(staged.sampling_rows, masks.places[: len(samplers)], masks.masks)
            reports = self._reports[: len(samplers)]
            return self._sampler.sample_changed(logits, changes, params, staged.sampled_lens, sampled, reports)
        if rows.draws[row_ids].any():
            self._sampler.sample(logits, params, staged.sampled_lens, sampled)
        else:
            self._sampler.most_likely(logits, sampled)
        return logits

    def _report_prompts(self, hidden: torch.Tensor, staged: MixedInputs) -> torch.Tensor:
        """Returns reports of the prompts' tokens in a step, `[report, REPORT_WORDS]`."""
        count, most = len(staged.prompt_rows), self._max_num_seqs
        reports = torch.empty(count, REPORT_WORDS, dtype=torch.int32, device=hidden.device)
        for first in range(0, count, most):
            part = slice(first, first + most)
            logits = self._decoder.logits(hidden.index_select(0, staged.prompt_rows[part]))
            self._sampler.report(logits, staged.prompt_tokens[part], staged.prompt_counts[part], reports[part])
        return reports

    def _take_writes(self) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Returns the changes of the state that go with this step; what is too much for one is sent before it."""
        offsets, values = self.row_observer.take_writes()
        while len(offsets) > _WRITE_ROOM:
            self._staging.begin()
            writes = self._put_writes(offsets[:_WRITE_ROOM], values[:_WRITE_ROOM])
            self._staging.send()
            self._apply(writes)
            offsets, values = offsets[_WRITE_ROOM:], values[_WRITE_ROOM:]
        return offsets, values

    def _put_groups(self, rows: SequenceRows, row_ids: Ints) -> tuple[bool, Writes | None]:
        """Puts what has changed in the groups of sequences with one query into the buffer; says whether they pay."""
        if self._groups is None or not self._groups.select(row_ids, rows.computed[row_ids]):
            return False, None
        return True, self._put_writes(*self._groups.take_writes())

    def _put_writes(self, offsets: Ints, values: npt.NDArray[np.int32]) -> Writes | None:
        """Puts changes into the buffer of this step."""
        if not len(offsets):
            return None
        return self._staging.put(offsets), self._staging.put(values)

    def _apply(self, writes: Writes | None, group_writes: Writes | None = None) -> None:
        """Launches the changes of the state, and of the groups."""
        apply_writes = self._decoder.operations.apply_writes
        if writes is not None:
            apply_writes(self._resident.state, *writes)
        if group_writes is not None:
            assert self._groups is not None, "they are its own"
            apply_writes(self._groups.columns.state, *group_writes)


def _takes_more(rows: SequenceRows, row_ids: Ints) -> bool:
    """Whether a batch takes more than a draw from the logits."""
    withholds = rows.withheld_until[row_ids] > rows.known[row_ids]
    return bool((rows.special[row_ids] | withholds).any())


def _note_unread(rows: SequenceRows, samplers: list[Sequence], row_ids: Ints, returned: Returned) -> None:
    """Notes where the tokens are that grammars have to take before they allow the next."""
    for place in np.flatnonzero(rows.constrained[row_ids]).tolist():
        samplers[place].unread.append(functools.partial(returned.word, place))


def gpu_steps(
    model: Llama,
    cache: KVCache,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    batch_invariant: bool = False,
    cascade: bool = True,
    scales: KVScales | None = None,
) -> GpuSteps:
    """Returns the steps of a model on the device of its cache, with the fastest operations that there are.

    With `batch_invariant`, with the fastest of which none lets a sequence's attention depend on others. Without
    `cascade`, each sequence reads its own prefix. `scales` are those of the cache, None for 1.
    """
    config = model.config
    operations = TritonOperations(
        cache,
        model.rotary,
        config.num_heads,
        config.sliding_window,
        max_num_seqs,
        max_model_len if batch_invariant else 0,
        cascade=cascade,
        scales=scales,
    )
    return GpuSteps(
        Decoder(model, operations),
        cache,
        TritonSampler(max_num_seqs, config.vocab_size, cache.device),
        runtime_of(cache.device),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )
