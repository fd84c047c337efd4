"""Runs in .venv-oracle: greedy tokens of transformers in float32, with the gap between the two best logits at each.

    .venv-oracle/bin/python tests/oracle/run_transformers.py GGUF REQUEST.json RESULT.json

REQUEST: {"prompts": [{"name", "text" or "messages"}], "new_tokens": n, "texts": [strings to tokenise]}.
RESULT: {"prompts": {name: {"prompt_ids", "tokens", "gaps", "logits"}}, "texts": [ids], "versions": {...}}. `logits` are
the 8 best (token, value) pairs of the first new token.
"""

import json
from pathlib import Path
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig


def generate(model: Any, ids: list[int], count: int) -> dict[str, Any]:
    """Returns greedy tokens, not stopping at the end-of-sequence token, with the gaps of the two best logits."""
    tokens, gaps, first = [], [], None
    past, inputs = None, torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(count):
            out = model(input_ids=inputs, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = out.past_key_values, out.logits[0, -1]
            best = torch.topk(logits, 8)
            if first is None:
                first = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            gaps.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
            inputs = torch.tensor([[tokens[-1]]])
    return {"prompt_ids": ids, "tokens": tokens, "gaps": gaps, "logits": first}


def main() -> None:
    """Runs the request."""
    gguf, request_path, result_path = map(Path, sys.argv[1:])
    request = json.loads(request_path.read_text())
    torch.set_num_threads(1)  # others run beside this, and threads that wait for each other suffer most
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True, gguf_file=gguf.name),
    ).eval()
    prompts = {}
    for prompt in request["prompts"]:
        if prompt["messages"]:
            messages = [{"role": role, "content": content} for role, content in prompt["messages"]]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt["text"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts[prompt["name"]] = generate(model, ids, request["new_tokens"])
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result_path.write_text(json.dumps({"prompts": prompts, "texts": texts, "versions": versions}))


if __name__ == "__main__":
    main()
