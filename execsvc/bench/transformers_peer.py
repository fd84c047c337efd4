"""Decoding with the continuous batching of transformers: a peer, run as a file by an interpreter that has it.

    python transformers_peer.py CONFIG_JSON DEVICE DTYPE BATCHES CONTEXT

Weights are random. Two runs that differ in the number of new tokens alone tell what a token costs: prompts, warming up
and starting are in both. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

_FEW, _MANY = 8, 72
_PAGE_SIZE = 256


def main(path: str, device: str, dtype: str, batches: list[int], context: int) -> dict[str, object]:
    """Returns what was measured."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path)
    kind = getattr(torch, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="paged|sdpa").eval()
    model.to(device=device, dtype=kind)
    rows = []
    for batch in batches:
        prompts = [[(7 * place + index) % config.vocab_size for place in range(context)] for index in range(batch)]
        seconds: dict[int, float] = {}
        # On a GPU it sizes its cache itself; elsewhere it would take all memory there is.
        blocks = None if device == "cuda" else batch * (2 + (context + _MANY) // _PAGE_SIZE) + 1
        batching = ContinuousBatchingConfig(page_size=_PAGE_SIZE, num_blocks=blocks)
        for count in (_FEW, _MANY, _FEW, _MANY):
            generation = GenerationConfig(
                max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            started = time.perf_counter()
            done = model.generate_batch(
                inputs=prompts,
                generation_config=generation,
                continuous_batching_config=batching,
                progress_bar=False,
            )
            seconds[count] = min(time.perf_counter() - started, seconds.get(count, float("inf")))
            produced = sum(len(output.generated_tokens) for output in done.values())
            if produced != batch * count:
                rows.append({"batch": batch, "context": context, "skipped": f"{produced} of {batch * count} tokens"})
                break
        else:
            longer = seconds[_MANY] - seconds[_FEW]
            row = {"batch": batch, "context": context}
            if longer > 0:
                rows.append(row | {"tokens_per_second": batch * (_MANY - _FEW) / longer})
            else:
                rows.append(row | {"skipped": "more tokens took no longer: the machine is busy with something else"})
    return {"name": f"transformers {transformers.__version__}, paged|sdpa", "decode": rows}


if __name__ == "__main__":
    where, on, kind, sizes, length = sys.argv[1:]
    found = main(where, on, kind, [int(part) for part in sizes.split(",")], int(length))
    sys.stdout.write(json.dumps(found) + "\n")
