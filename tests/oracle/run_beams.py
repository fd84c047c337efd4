"""Runs in .venv-oracle: what transformers finds by beam search, for each case.

.venv-oracle/bin/python tests/oracle/run_beams.py DIRECTORY CASES.json RESULT.json

CASES: [{"ids", "width", "max_tokens", "ends", "length_penalty", "early_stopping"}]. RESULT: the completions of each,
the best first, without what pads them.
"""

import json
from pathlib import Path
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Runs the cases."""
    directory, cases, result = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for case in json.loads(Path(cases).read_text()):
        ids = torch.tensor([case["ids"]])
        completions = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=case["width"],
            num_return_sequences=case["width"],
            do_sample=False,
            max_new_tokens=case["max_tokens"],
            eos_token_id=case["ends"] or None,
            pad_token_id=0,
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
        )[:, len(case["ids"]) :].tolist()
        found.append([_cut(tokens, case["ends"]) for tokens in completions])
    Path(result).write_text(json.dumps(found))


def _cut(tokens: list[int], ends: list[int]) -> list[int]:
    """Returns tokens up to the one that ends them."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens


if __name__ == "__main__":
    main()
