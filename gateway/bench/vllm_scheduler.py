"""The steps of vLLM's own scheduler. Run by another interpreter, as a file: it imports vLLM and the standard library.

Reads names of measurements from standard input, one a line, and answers each with one line of JSON: an object of sample
lists, in seconds of processor time. The first line that it writes says what it runs on.

    python vllm_scheduler.py BLOCK_SIZE

Nothing here is imported by Quire.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import pathlib
import platform
import random
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BLOCKS = 100_000
MAX_MODEL_LEN = 131_072
PROMPT_BLOCKS = 4
TOKEN = 7

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 1 << 17,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


class Running:
    """vLLM's scheduler (its default classes and settings) with `count` requests that decode.

    Args:
        settings: a VllmConfig.
        block_size: tokens in a block.
        count: running requests; their lengths are shifted, so that 1 of block_size fills a block in every step.
    """

    def __init__(self, settings: Any, block_size: int, count: int) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request
        from vllm.v1.structured_output import StructuredOutputManager

        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        memory = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
        settings.cache_config.num_gpu_blocks = BLOCKS
        kv_cache_utils.init_none_hash(sha256)
        hasher = kv_cache_utils.get_request_block_hasher(block_size, sha256)
        self._scheduler = Scheduler(
            vllm_config=settings,
            kv_cache_config=memory,
            structured_output_manager=StructuredOutputManager(settings),
            block_size=block_size,
        )
        self._output = ModelRunnerOutput
        draw = random.Random(0)
        params = SamplingParams(max_tokens=MAX_MODEL_LEN // 2, temperature=0.0, ignore_eos=True)
        for index in range(count):
            tokens = [draw.getrandbits(16) for _ in range(PROMPT_BLOCKS * block_size + index % block_size)]
            self._scheduler.add_request(Request(f"r{index}", tokens, params, None, block_hasher=hasher))
        # Prompts, and a block of each.
        for _ in range(2 * block_size):
            self.step()

    def step(self) -> tuple[float, float]:
        """Runs a step; returns the seconds of `schedule` and of `update_from_output`."""
        begun = time.thread_time()
        plan = self._scheduler.schedule()
        planned = time.thread_time()
        names = list(plan.num_scheduled_tokens)
        sampled = [[TOKEN] for _ in names]
        output = self._output(
            req_ids=names, req_id_to_index={name: place for place, name in enumerate(names)}, sampled_token_ids=sampled
        )
        computed = time.thread_time()
        self._scheduler.update_from_output(plan, output)
        return planned - begun, time.thread_time() - computed


class Peer:
    """Answers measurements by name: "steps COUNT" for as many running requests.

    Args:
        block_size: tokens in a block.
        folder: an empty folder for the description of a model.
    """

    def __init__(self, block_size: int, folder: str) -> None:
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs

        self.version = f"{vllm.__version__}, torch {torch.__version__}"
        self._size = block_size
        pathlib.Path(folder, "config.json").write_text(json.dumps(MODEL))
        self._arguments = {
            "model": folder,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "block_size": block_size,
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 2 * MAX_MODEL_LEN,
        }
        self._engine_arguments = EngineArgs
        self._running: dict[int, Running] = {}

    def steps(self, count: int) -> dict[str, list[float]]:
        """Times steps of `count` running requests."""
        if count not in self._running:
            settings = self._engine_arguments(**self._arguments, max_num_seqs=count).create_engine_config()
            settings.scheduler_config.async_scheduling = False
            self._running[count] = Running(settings, self._size, count)
            # As vLLM's engine core does after it has started.
            gc.collect()
            gc.freeze()
        taken = [self._running[count].step() for _ in range(2 * self._size)]
        schedules, updates = zip(*taken, strict=True)
        both = list(itertools.starmap(float.__add__, taken))
        return {
            f"schedule_and_update_{count}": both,
            f"schedule_{count}": list(schedules),
            f"update_{count}": list(updates),
        }


def main() -> None:
    """Answers measurements until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    # What vLLM prints must not get between the answers.
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            peer = Peer(int(sys.argv[1]), folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
            return
        about = {"name": "vllm", "version": peer.version, "python": platform.python_version()}
        print(json.dumps(about), file=out, flush=True)
        for line in sys.stdin:
            try:
                answer: dict[str, Any] = peer.steps(int(line.split()[1]))
            except Exception as error:  # noqa: BLE001 - the same
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
