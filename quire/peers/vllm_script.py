"""vLLM's engine as a peer. Run as a file by an interpreter that has vLLM (see quire.peers.process)."""

from __future__ import annotations

import os
from pathlib import Path
import sys
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from serving import prompts, run, take_standard_output

_FEW, _TRIES, _VOCAB = 4, 3, 30_000


class VllmEngine:
    """One engine in this process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="4",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            HF_HUB_OFFLINE="1",
        )
        import vllm  # noqa: PLC0415 - the environment comes first

        self._sampling = vllm.SamplingParams
        self._llm = vllm.LLM(
            arguments["model"],
            dtype="bfloat16",
            max_model_len=arguments["len"],
            max_num_seqs=arguments["seqs"],
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
        )
        # Its own start may have changed the number.
        torch = sys.modules["torch"]
        torch.set_num_threads(arguments["threads"])
        self.about = {"version": vllm.__version__, "threads": torch.get_num_threads()}

    def _seconds(self, token_ids: list[list[int]], output: int) -> float:
        sampling = self._sampling(
            temperature=0.0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        done = self._llm.generate([{"prompt_token_ids": ids} for ids in token_ids], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        produced = sum(len(request.outputs[0].token_ids) for request in done)
        assert produced == output * len(token_ids), f"{produced} tokens"
        return seconds

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Two runs that differ in their tokens alone tell what a step costs; prompts come from its cache."""
        token_ids = prompts(batch, context, batch, _VOCAB)
        self._seconds(token_ids, 1)
        for _ in range(_TRIES):
            few, many = self._seconds(token_ids, _FEW), self._seconds(token_ids, _FEW + steps)
            if many > few:
                return {"seconds": (many - few) / steps}
        raise RuntimeError("more tokens took no longer: the machine is busy with something else")

    def prefill(self, length: int, seed: int) -> dict[str, Any]:
        """See Engine."""
        return {"seconds": self._seconds(prompts(1, length, seed, _VOCAB), 1)}

    def serve(self, count: int, prompt: int, output: int, seed: int) -> dict[str, Any]:
        """See Engine."""
        return {"seconds": self._seconds(prompts(count, prompt, seed, _VOCAB), output), "tokens": count * output}


if __name__ == "__main__":
    run(take_standard_output(), VllmEngine)
