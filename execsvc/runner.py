"""Steps that are computed in the thread that asks for them."""

import abc
import time

import numpy as np
import numpy.typing as npt
import torch

from execsvc import batch as batches
from execsvc.attention import AttentionBackend
from execsvc.batch import Batch
from execsvc.choosing import add_prompt_logprobs, choose
from execsvc.kv_cache import KVCache
from execsvc.model.config import ModelConfig
from execsvc.model.llama import Llama
from execsvc.model.native import NativeModel
from execsvc.sequences import Sequence, SequenceRows
from execsvc.steps import FinishedStep, Observe
from quire.errors import InvariantError


class HostSteps(abc.ABC):
    """Steps that are done when they are launched. Implements `execsvc.steps.Steps`."""

    row_observer = None

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        """Computes a model of `config` on `cache`."""
        self.config = config
        self._cache = cache

    @abc.abstractmethod
    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[int] | None]:
        """Computes the batch: writes keys and values of its tokens.

        Returns:
            `[row, vocabulary]` logits: of each sequence of `batch.sampled`, then of each of `batch.reported`; and the
            most likely token of each, -1 where logits are not finite, or None if the sampler has to look for it.
        """

    def launch(
        self, rows: SequenceRows, scheduled: list[tuple[Sequence, int]], observe: Observe | None
    ) -> FinishedStep:
        """Computes a step; see Steps."""
        batch = batches.build(rows, scheduled, self._cache.device)
        started = time.perf_counter_ns()
        logits, best = self.forward(batch)
        computed = time.perf_counter_ns()
        samplers = [batch.sequences[index] for index in batch.sampled]
        if observe is not None:
            observe([sequence.table for sequence in samplers], logits)
        positions = [int(rows.known[sequence.row]) for sequence in samplers]
        best = None if best is None else best[: len(samplers)]
        choice = choose(logits[: len(samplers)], samplers, positions, best)
        for row, (index, position) in zip(logits[len(samplers) :], batch.reported, strict=True):
            add_prompt_logprobs(choice.logprobs, batch.sequences[index], position, row)
        return FinishedStep(
            batch.sequences,
            batch.context_lens.tolist(),
            batch.sampled,
            choice.tokens,
            computed - started,
            time.perf_counter_ns() - computed,
            choice.siblings,
            choice.logprobs,
        )

    def mark(self) -> FinishedStep:
        """See Steps."""
        return FinishedStep()

    def copy_blocks(self, pairs: npt.NDArray[np.int64]) -> None:
        """See Steps."""
        self._cache.copy_blocks(torch.from_numpy(pairs).to(self._cache.device))

    def calculate_kv_scales(self) -> None:
        """See Steps; raises InvariantError."""
        raise InvariantError("a float8 cache has steps of its own: execsvc.gpu")

    def synchronize(self) -> None:
        """Waits for the device, if there is one."""
        if self._cache.device.type == "cuda":
            torch.cuda.synchronize(self._cache.device)


class Runner(HostSteps):
    """A model in torch and the attention it uses."""

    def __init__(self, model: Llama, attention: AttentionBackend, cache: KVCache) -> None:
        """Computes `model` with `attention` on `cache`."""
        super().__init__(model.config, cache)
        self.model = model
        self.attention = attention

    @torch.inference_mode()
    def forward(self, batch: Batch) -> tuple[torch.Tensor, None]:
        """See HostSteps."""
        self.attention.begin(batch)
        stream = self.model.hidden(batch.tokens, batch.positions, self.attention.attend)
        rows = stream.index_select(0, batch.sampled_rows)
        if not len(rows):
            return rows.new_empty(0, self.config.vocab_size), None
        return self.model.logits(rows)[: batch.logit_count], None


class NativeRunner(HostSteps):
    """A model on the compiled CPU step. Its cache holds keys and values as panels, see `kernels.cpu.panels`."""

    def __init__(self, model: NativeModel, cache: KVCache) -> None:
        """Computes `model` on `cache`, whose element type is the one that the model was loaded for."""
        super().__init__(model.config, cache)
        self.model = model

    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[int]]:
        """See HostSteps; the logits are float32."""
        logits, best = self.model.decoder.step(
            self._cache.data,
            batch.tokens,
            batch.positions,
            batch.slots,
            batch.block_tables,
            batch.context_lens,
            batch.query_starts,
            batch.sampled_rows[: batch.logit_count],
        )
        return logits, best.tolist()
