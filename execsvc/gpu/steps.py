"""Steps on a device that works beside the host.

A step in which every sequence computes its last known token and samples the next one, a decode step, is a replay of
graphs captured for its padded size: the body (stage, forward, logits) and the tail (choose, advance). Between the two,
logits can be changed by what graphs do not know. A second body reads prefixes that sequences share once for all of
them, for steps in which that pays. Any other step is launched piece by piece.

    host    one pinned buffer: what changed in the state, the rows of the batch, and for other steps their tokens
    device  apply changes -> body -> tail -> tokens to pinned memory, event

The host never waits before the event, and knows lengths without tokens, so the next step can be launched meanwhile:
its input is the token that the device has noted itself.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch

from execsvc.batch import Arrangement, arrange
from execsvc.choosing import Choice, LogprobRows, Siblings, add_prompt_logprobs, choose
from execsvc.gpu.decoder import Decoder
from execsvc.gpu.ladder import ladder, rung_of_size
from execsvc.gpu.operations import Operations, TritonOperations
from execsvc.gpu.resident import ResidentRows
from execsvc.gpu.runtime import Graph, Runtime, runtime_of
from execsvc.gpu.sampling import DeviceSampler, TritonSampler
from execsvc.gpu.staging import ReturnedTokens, Staging, TokenReturn
from execsvc.gpu.step_groups import StepGroups
from execsvc.kv_cache import KVCache
from execsvc.model.llama import Llama
from execsvc.prefix_tree import PrefixTree
from execsvc.sequences import Sequence, SequenceRows
from execsvc.steps import Observe
from kernels.step_state.tensors import Staged

_STAGING_DEPTH: Final = 4
_PADDING: Final = 128
"""Words that go to the alignment of what is put into a buffer."""
_WRITE_ROOM: Final = 65536
"""Changes of the state that go with a step; more are sent in portions before it."""

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
    tail: Graph


@dataclasses.dataclass(slots=True)
class Launched:
    """A step that is on its way. Implements `execsvc.steps.LaunchedStep`."""

    deferred: ClassVar[bool] = True
    sequences: list[Sequence]
    lens: list[int]
    sampled: list[int]
    returned: ReturnedTokens
    clock: Clock
    started_ns: int
    choice: Choice = dataclasses.field(default_factory=Choice)
    """What the host chose and reports; its tokens are among the returned ones."""
    model_ns: int = 0

    def wait(self) -> None:
        """Waits until the device is done with it. Any thread may wait."""
        self.returned.wait()
        self.model_ns = self.clock.finish(self.started_ns)

    def tokens(self) -> list[int]:
        """See LaunchedStep."""
        return self.returned.take()

    @property
    def siblings(self) -> Siblings:
        """See LaunchedStep."""
        return self.choice.siblings

    @property
    def logprobs(self) -> LogprobRows:
        """See LaunchedStep."""
        return self.choice.logprobs

    def durations(self) -> tuple[int, int]:
        """See LaunchedStep; choosing tokens is part of the model's graphs."""
        return self.model_ns, 0


@dataclasses.dataclass(slots=True)
class Clock:
    """Tells how long the device took for a step though another one was before it."""

    last_ns: int = 0
    """When the last step was done."""

    def finish(self, started_ns: int) -> int:
        """Notes that a step launched at `started_ns` is done now; returns how long the device had it alone."""
        now = time.perf_counter_ns()
        duration = now - max(started_ns, self.last_ns)
        self.last_ns = now
        return duration


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
        self.row_observer = ResidentRows(max_num_seqs, block_max, runtime.device)
        self._resident = self.row_observer.device_state
        self._max_num_seqs = max_num_seqs
        self._groups = self._prefix_groups(decoder.operations)
        group_words = 0 if self._groups is None else len(self._groups.columns.state)
        room = 2 * _WRITE_ROOM + 9 * max_num_seqs + 4 * max_num_batched_tokens + 2 * group_words + _PADDING
        self._staging = Staging(runtime, room, _STAGING_DEPTH)
        self._returns = TokenReturn(runtime, max_num_seqs)
        self._staged = Staged.allocate(max_num_seqs, block_max, runtime.device)
        self._clock = Clock()
        self._places = torch.arange(max_num_seqs, dtype=torch.int32, device=runtime.device)
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int32, device=runtime.device)
        self._logits = torch.empty(0, device=runtime.device)
        self._rungs: dict[int, Rung] = {}
        self._rung_of_size: list[int] = []

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

        # Captured on padding: nothing is written to the cache and no row advances.
        self._staging.words[:size].fill_(-1)
        capture = self._runtime.capture
        grouped_body = None
        if self._groups is not None and size > 1:
            grouped_body = capture(functools.partial(body, grouped=True))
        return Rung(capture(body), grouped_body, capture(greedy_tail), capture(tail))

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
        row_ids = np.array([sequence.row for sequence, _ in scheduled], dtype=np.int64)
        counts = np.array([count for _, count in scheduled], dtype=np.int64)
        computed = rows.computed[row_ids]
        decodes = (counts == 1) & (computed + 1 == rows.known[row_ids])
        hosted = bool(rows.special[row_ids].any())
        if len(scheduled) < len(self._rung_of_size) and decodes.all() and not hosted:
            sequences = [sequence for sequence, _ in scheduled]
            returned = self._launch_decode(rows, sequences, row_ids, observe)
            sampled = list(range(len(sequences)))
            return Launched(sequences, (computed + 1).tolist(), sampled, returned, self._clock, started_ns)
        plan = arrange(rows, scheduled)
        returned, choice = self._launch_mixed(rows, plan, observe)
        lens = plan.context_lens.tolist()
        return Launched(plan.sequences, lens, plan.sampled, returned, self._clock, started_ns, choice)

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
        self,
        rows: SequenceRows,
        sequences: list[Sequence],
        row_ids: Ints,
        observe: Observe | None,
    ) -> ReturnedTokens:
        """Replays the graphs of the padded size."""
        count = len(sequences)
        size = self._rung_of_size[count]
        rung = self._rungs[size]
        offsets, values = self._take_writes()
        self._staging.begin()
        self._staging.put(row_ids, size, fill=-1)
        writes = self._put_writes(offsets, values)
        grouped, group_writes = self._put_groups(rows, row_ids)
        withheld = self._put_withheld(rows, sequences, row_ids)
        self._staging.send()
        self._apply(writes, group_writes)
        (rung.grouped_body if grouped and rung.grouped_body is not None else rung.body).replay()
        logits = self._logits[:count]
        self._withhold(logits, withheld)
        if observe is not None:
            observe([sequence.table for sequence in sequences], logits)
        (rung.tail if rows.draws[row_ids].any() else rung.greedy_tail).replay()
        return self._returns.send(self._sampled[:count])

    def _launch_mixed(
        self,
        rows: SequenceRows,
        plan: Arrangement,
        observe: Observe | None,
    ) -> tuple[ReturnedTokens, Choice]:
        """Launches a step with chunks of prompts, or with what the host chooses, piece by piece."""
        staging, operations = self._staging, self._decoder.operations
        resident = self._resident
        samplers = [plan.sequences[index] for index in plan.sampled]
        offsets, values = self._take_writes()
        staging.begin()
        batch_rows = staging.put(plan.row_ids)
        lens = staging.put(plan.context_lens)
        split = plan.decode_count
        starts = staging.put(plan.query_starts[split:] - split)
        places = np.full(len(plan.sequences), -1)
        places[plan.sampled] = np.arange(len(samplers))
        sample_places = staging.put(places)
        sampled_rows = staging.put(plan.query_starts[1:][plan.sampled] - 1)
        sampled_lens = staging.put(plan.context_lens[plan.sampled])
        sampling_rows = staging.put(plan.row_ids[plan.sampled])
        # What the device alone may know yet, the last token of a sequence that decodes, is taken from its state.
        tokens = staging.put(np.where(plan.last_known, -1, plan.tokens))
        token_rows = staging.put(plan.row_ids[plan.owners])
        positions, slots = staging.put(plan.positions), staging.put(plan.slots)
        writes = self._put_writes(offsets, values)
        grouped, group_writes = self._put_groups(rows, plan.row_ids[:split])
        withheld = self._put_withheld(rows, samplers, plan.row_ids[plan.sampled])
        staging.send()
        self._apply(writes, group_writes)
        inputs = torch.where(tokens < 0, resident.tokens.index_select(0, token_rows), tokens).long()
        tables = resident.tables.index_select(0, batch_rows)
        longest = int((plan.query_starts[1:] - plan.query_starts[:-1]).max(initial=0))

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            parts = []
            if split:
                parts.append(operations.attend_last(layer, q[:split], tables[:split], lens[:split], grouped=grouped))
            if len(q) > split:
                parts.append(operations.attend_chunks(layer, q[split:], tables[split:], lens[split:], starts, longest))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        hidden = self._decoder.hidden(inputs, positions.long(), slots.long(), attend)
        sampled = self._sampled[: len(samplers)]
        choice = Choice()
        if samplers:
            logits = self._decoder.logits(hidden.index_select(0, sampled_rows))
            self._withhold(logits, withheld)
            if observe is not None:
                observe([sequence.table for sequence in samplers], logits)
            if rows.draws[plan.row_ids].any():
                params = resident.params.index_select(1, sampling_rows)
                self._sampler.sample(logits, params, sampled_lens, sampled)
            else:
                self._sampler.most_likely(logits, sampled)
            choice = self._choose_on_host(rows, samplers, logits, sampled)
        for index, position in plan.reported:
            row = int(plan.query_starts[index + 1]) - int(plan.context_lens[index]) + position
            prompt_logits = self._decoder.logits(hidden[row : row + 1])[0]
            add_prompt_logprobs(choice.logprobs, plan.sequences[index], position, prompt_logits)
        operations.advance(resident, batch_rows, lens, sampled, sample_places)
        return self._returns.send(sampled), choice

    def _choose_on_host(
        self, rows: SequenceRows, samplers: list[Sequence], logits: torch.Tensor, sampled: torch.Tensor
    ) -> Choice:
        """Chooses where it takes more than the device knows, for which the host waits. Writes `sampled`."""
        places = [place for place, sequence in enumerate(samplers) if sequence.special]
        if not places:
            return Choice()
        positions = [int(rows.known[samplers[place].row]) for place in places]
        found = choose(logits[places], [samplers[place] for place in places], positions)
        sampled[places] = torch.tensor(found.tokens, dtype=sampled.dtype, device=sampled.device)
        for place in places:
            rows.special[samplers[place].row] = samplers[place].special
        siblings = {places[place]: tokens for place, tokens in found.siblings.items()}
        return Choice(siblings=siblings, logprobs=found.logprobs)

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

    def _put_withheld(
        self, rows: SequenceRows, sequences: list[Sequence], row_ids: Ints
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Puts (sample, token) of tokens that must not be sampled into the buffer; None where there are none."""
        places = np.flatnonzero(rows.withheld_until[row_ids] > rows.known[row_ids])
        if not len(places):
            return None
        pairs = np.array([(place, token) for place in places for token in sequences[place].sampling.withheld])
        if pairs.size <= self._staging.room:
            return self._staging.put(pairs[:, 0]), self._staging.put(pairs[:, 1])
        device_pairs = torch.from_numpy(pairs).to(self._runtime.device)
        return device_pairs[:, 0], device_pairs[:, 1]

    def _withhold(self, logits: torch.Tensor, withheld: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Makes withheld tokens impossible. Writes `logits`."""
        if withheld is not None:
            places, tokens = withheld
            logits[places.long(), tokens.long()] = float("-inf")


def gpu_steps(
    model: Llama,
    cache: KVCache,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    batch_invariant: bool = False,
    cascade: bool = True,
) -> GpuSteps:
    """Returns the steps of a model on the device of its cache, with the fastest operations that there are.

    With `batch_invariant`, with the fastest of which none lets a sequence's attention depend on others. Without
    `cascade`, each sequence reads its own prefix.
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
