"""The same work on vLLM's own classes. Run by another interpreter, as a file: it imports vLLM and the standard library.

Reads names of measurements from standard input, one a line, and answers each with one line of JSON: an object of
sample lists, in seconds (`bytes_per_cached_block` in bytes). The first line that it writes says what it runs on.

    python vllm_peer.py BLOCK_SIZE

Nothing here is imported by Quire.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import platform
import random
import sys
import time
import tracemalloc
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

BLOCKS = 100_000
PROMPT_TOKENS = 8192
RUNNING = 256
MAX_MODEL_LEN = 131_072
ADMISSIONS = 8
CACHED_BLOCKS_FILLED = 40_000


class Peer:
    """vLLM's block pool and KV cache manager, one full-attention group, prefix caching on, sha256 (its defaults).

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        import torch
        import vllm
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core import kv_cache_manager, kv_cache_utils
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        self.version = f"{vllm.__version__}, torch {torch.__version__}"
        self._size = block_size
        self._manager_class = kv_cache_manager.KVCacheManager
        self._request_class = Request
        self._utils = kv_cache_utils
        self._sha256 = sha256
        self._params = SamplingParams(max_tokens=MAX_MODEL_LEN // 2, temperature=0.0)
        self._config = KVCacheConfig
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self._group = KVCacheGroupSpec(["layer"], spec)
        kv_cache_utils.init_none_hash(sha256)
        self._hasher = kv_cache_utils.get_request_block_hasher(block_size, sha256)
        self._names = itertools.count()
        self._random = random.Random(0)
        self._admitting = self.manager(BLOCKS)
        self._stepping: Any = None
        self._running: list[Any] = []
        # As vLLM's engine core does after it has started.
        gc.collect()
        gc.freeze()

    def manager(self, blocks: int) -> Any:
        """Returns a cache manager of `blocks` blocks."""
        config = self._config(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[self._group])
        return self._manager_class(config, MAX_MODEL_LEN, self._size, self._size, enable_caching=True, log_stats=False)

    def prompt(self, length: int) -> list[int]:
        """Returns tokens that nobody has seen."""
        return [self._random.getrandbits(17) for _ in range(length)]

    def request(self, tokens: list[int]) -> Any:
        """Returns a request; its full blocks are hashed by this."""
        return self._request_class(f"r{next(self._names)}", tokens, self._params, None, block_hasher=self._hasher)

    def take_free(self) -> dict[str, list[float]]:
        """Times taking and freeing 100 blocks."""
        pool = self._admitting.block_pool
        taking, freeing = [], []
        for _ in range(100):
            begun = time.perf_counter()
            blocks = pool.get_new_blocks(100)
            between = time.perf_counter()
            pool.free_blocks(blocks)
            freeing.append(time.perf_counter() - between)
            taking.append(between - begun)
        return {"take_100": taking, "free_100": freeing}

    def admit(self) -> dict[str, list[float]]:
        """Times admissions of a prompt never seen, and of the same one again: request, hashes, look-up, blocks.

        vLLM publishes the blocks in `allocate_slots`, so that all of it is in these figures.
        """
        samples: dict[str, list[float]] = {"admit_8192_cold": [], "admit_8192_cached": []}
        for _ in range(ADMISSIONS):
            tokens = self.prompt(PROMPT_TOKENS)
            for name, times in samples.items():
                begun = time.perf_counter()
                request = self.request(tokens)
                blocks, count, _ = self._admitting.get_computed_blocks(request)
                granted = self._admitting.allocate_slots(request, PROMPT_TOKENS - count, count, blocks)
                times.append(time.perf_counter() - begun)
                assert granted is not None
                assert (count > 0) == (name == "admit_8192_cached"), count
                self._admitting.free(request)
        return samples

    def step(self) -> dict[str, list[float]]:
        """Times the decode steps of 256 running sequences, 1 of block_size of which needs a block in each.

        `step_256` is `allocate_slots` for every one. What vLLM does beside it to have the 16 full blocks hashed
        (`append_output_token_ids`) is given apart, as `step_256_append`.
        """
        if self._stepping is None:
            self._start_running()
        allocating, appending = [], []
        for _ in range(4 * self._size):
            allocate = self._stepping.allocate_slots
            begun = time.perf_counter()
            for request in self._running:
                allocate(request, 1)
            between = time.perf_counter()
            for request in self._running:
                request.append_output_token_ids(7)
            appending.append(time.perf_counter() - between)
            allocating.append(between - begun)
            for request in self._running:
                request.num_computed_tokens += 1
        return {"step_256": allocating, "step_256_append": appending}

    def _start_running(self) -> None:
        self._stepping = self.manager(BLOCKS)
        for index in range(RUNNING):
            request = self.request(self.prompt(4 * self._size + index % self._size))
            blocks, count, _ = self._stepping.get_computed_blocks(request)
            assert self._stepping.allocate_slots(request, request.num_tokens - count, count, blocks) is not None
            request.num_computed_tokens = request.num_tokens
            request.append_output_token_ids(7)
            self._running.append(request)

    def hash(self) -> dict[str, list[float]]:
        """Times hashing the full blocks of 8,192 tokens."""
        tokens = self.prompt(PROMPT_TOKENS)
        samples = []
        for _ in range(40):
            parent = None
            begun = time.perf_counter()
            for start in range(0, PROMPT_TOKENS, self._size):
                parent = self._utils.hash_block_tokens(self._sha256, parent, tokens[start : start + self._size], None)
            samples.append(time.perf_counter() - begun)
        return {"hash_8192": samples}

    def cached_bytes(self) -> dict[str, list[float]]:
        """Measures the traced memory of a pool that is full of cached blocks; no request is left."""
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        manager = self.manager(CACHED_BLOCKS_FILLED + 1)
        for _ in range(CACHED_BLOCKS_FILLED // 1000):
            request = self.request(self.prompt(1000 * self._size))
            assert manager.allocate_slots(request, request.num_tokens) is not None
            manager.free(request)
        del request
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        return {"bytes_per_cached_block": [used / CACHED_BLOCKS_FILLED]}


def main() -> None:
    """Answers measurements until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    # What vLLM prints must not get between the answers.
    os.dup2(2, 1)
    try:
        peer = Peer(int(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return
    about = {"name": "vllm", "version": peer.version, "python": platform.python_version()}
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = getattr(peer, line.strip())()
        except Exception as error:  # noqa: BLE001 - the same
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
