"""Runs in .venv-oracle: logits of transformers for the last token of one prompt, for each model directory given.

.venv-oracle/bin/python tests/oracle/run_tiny.py IDS.json RESULT.json DIRECTORY...
"""

import json
from pathlib import Path
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Runs the models."""
    ids = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    logits = {}
    for directory in sys.argv[3:]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.inference_mode():
            logits[directory] = model(torch.tensor([ids])).logits[0, -1].tolist()
    Path(sys.argv[2]).write_text(json.dumps(logits))


if __name__ == "__main__":
    main()
