"""llama.cpp as a peer, through llama-cpp-python's low-level calls. Run as a file (see quire.peers.process)."""

from __future__ import annotations

import ctypes
from pathlib import Path
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from serving import prompts, run, take_standard_output

_VOCAB, _BATCH = 30_000, 512


class LlamaCppEngine:
    """A model, and a context for the case that is measured."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._threads = arguments["threads"]
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(arguments["model"].encode(), parameters)
        assert self._model, f"no model in {arguments['model']}"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._context: Any = None
        self._case: tuple[int, int] | None = None
        self._lengths: list[int] = []
        self.about = {"version": f"llama-cpp-python {llama_cpp.__version__}", "threads": self._threads}

    def _open(self, count: int, length: int) -> None:
        """Makes an empty context for `count` sequences of up to `length` tokens."""
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = count * (-(-length // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_seq_max = count
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        assert self._context, "no context"
        self._lengths = [0] * count
        self._case = None

    def _compute(self, tokens: list[tuple[int, int, bool]]) -> list[int]:
        """Computes (sequence, token, whether its successor is wanted); returns the successors, greedily."""
        found = []
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            batch = self._batch
            batch.n_tokens = len(part)
            for index, (sequence, token, wanted) in enumerate(part):
                batch.token[index], batch.pos[index] = token, self._lengths[sequence]
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = wanted
                self._lengths[sequence] += 1
            assert llama_cpp.llama_decode(self._context, batch) == 0, "llama_decode failed"
            for index, (_, _, wanted) in enumerate(part):
                if wanted:
                    row = llama_cpp.llama_get_logits_ith(self._context, index)
                    view = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
                    found.append(int(view.argmax()))
        return found

    def _fill(self, token_ids: list[list[int]]) -> list[int]:
        """Computes prompts; returns the token after each."""
        flat = [
            (sequence, token, index == len(ids) - 1)
            for sequence, ids in enumerate(token_ids)
            for index, token in enumerate(ids)
        ]
        return self._compute(flat)

    def _steps(self, last: list[int], steps: int) -> list[int]:
        for _ in range(steps):
            last = self._compute([(sequence, token, True) for sequence, token in enumerate(last)])
        return last

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """See Engine. A case that is asked for again goes on where it was."""
        if self._case != (batch, context):
            self._open(batch, context + 200)
            self._last = self._steps(self._fill(prompts(batch, context, batch, _VOCAB)), 2)
            self._case = (batch, context)
        started = time.perf_counter()
        self._last = self._steps(self._last, steps)
        return {"seconds": (time.perf_counter() - started) / steps}

    def prefill(self, length: int, seed: int) -> dict[str, Any]:
        """See Engine."""
        self._open(1, length)
        token_ids = prompts(1, length, seed, _VOCAB)
        started = time.perf_counter()
        self._fill(token_ids)
        return {"seconds": time.perf_counter() - started}

    def serve(self, count: int, prompt: int, output: int, seed: int) -> dict[str, Any]:
        """See Engine."""
        self._open(count, prompt + output)
        token_ids = prompts(count, prompt, seed, _VOCAB)
        started = time.perf_counter()
        self._steps(self._fill(token_ids), output - 1)
        return {"seconds": time.perf_counter() - started, "tokens": count * output}


if __name__ == "__main__":
    run(take_standard_output(), LlamaCppEngine)
