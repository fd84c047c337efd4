"""Steps that are computed in the thread that asks for them."""

import time

import numpy as np
import numpy.typing as npt
import torch

from execsvc import batch as batches
from execsvc.attention import AttentionBackend
from execsvc.batch import Batch
from execsvc.kv_cache import KVCache
from execsvc.model.llama import Llama
from execsvc.sampler import sample
from execsvc.sequences import Sequence, SequenceRows
from execsvc.siblings import sample_siblings
from execsvc.steps import FinishedStep, Observe


class Runner:
    """A model and the attention it uses. Implements `execsvc.steps.Steps`."""

    row_observer = None

    def __init__(self, model: Llama, attention: AttentionBackend, cache: KVCache) -> None:
        """Computes `model` with `attention` on `cache`."""
        self.model = model
        self.config = model.config
        self.attention = attention
        self._cache = cache

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Computes the batch: writes keys and values of its tokens.

        Returns:
            `[sampled, vocabulary]` logits, a row for each sequence of `batch.sampled`.
        """
        self.attention.begin(batch)
        stream = self.model.hidden(batch.tokens, batch.positions, self.attention.attend)
        rows = stream.index_select(0, batch.sampled_rows)
        if not len(rows):
            return rows.new_empty(0, self.model.config.vocab_size)
        return self.model.logits(rows)[: len(batch.sampled)]

    def launch(
        self, rows: SequenceRows, scheduled: list[tuple[Sequence, int]], observe: Observe | None
    ) -> FinishedStep:
        """Computes a step; see Steps."""
        batch = batches.build(rows, scheduled, self._cache.device)
        started = time.perf_counter_ns()
        logits = self.forward(batch)
        computed = time.perf_counter_ns()
        samplers = [batch.sequences[index] for index in batch.sampled]
        if observe is not None:
            observe([sequence.table for sequence in samplers], logits)
        positions = [int(rows.known[sequence.row]) for sequence in samplers]
        tokens = sample(logits, [sequence.sampling for sequence in samplers], positions) if samplers else []
        siblings = sample_siblings(logits, samplers, positions)
        return FinishedStep(
            batch.sequences,
            batch.context_lens.tolist(),
            batch.sampled,
            tokens,
            computed - started,
            time.perf_counter_ns() - computed,
            siblings,
        )

    def mark(self) -> FinishedStep:
        """See Steps."""
        return FinishedStep()

    def copy_blocks(self, pairs: npt.NDArray[np.int64]) -> None:
        """See Steps."""
        self._cache.copy_blocks(torch.from_numpy(pairs).to(self._cache.device))

    def synchronize(self) -> None:
        """Waits for the device, if there is one."""
        if self._cache.device.type == "cuda":
            torch.cuda.synchronize(self._cache.device)
