"""What transformers answers, computed once a machine and kept under .cache/oracle.

from tests.oracle.expected import expected, oracle_available

answers = expected()                         # name -> Answer
answers["short-0"].tokens                    # 64 greedy tokens of transformers in float32
answers["short-0"].first_difference(mine)    # None, or the index of the first that counts
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
import subprocess

from execsvc.model.source import packaged_model
from tests.made_once import made_once
from tests.oracle.prompts import NEW_TOKENS, PROMPTS

ROOT = Path(__file__).parents[2]
ORACLE_PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
_SCRIPT = Path(__file__).with_name("run_transformers.py")
_DEADLINE_SECONDS = 1200
GAP = 0.001
"""A difference counts only where the two best logits of the reference are further apart than this."""

TEXTS = (
    "Hello, world!",
    "In 2024 there were 12345 items, 3.14159 and 1e-9.",
    "  leading, double  spaces\tand\ttabs\n\n\nnewlines  \n",
    "naïve café — “quotes” … 東京の天気は晴れ 🌊🏴‍☠️ Ω≈ç√∫",
    "don't can't we'll THEY'RE i'd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
    "def f(x):\n\treturn x**2  # comment\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u00a0non-breaking\u200bzero-width\r\nCRLF",
    "123 456,789.00",
)
"""Texts whose ids transformers is asked for: digits, unicode, whitespace, special tokens.

No numeric characters beyond ASCII: what transformers builds from a GGUF file does not split at those, while the model's
own tokenizer.json, llama.cpp and we do.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The reference's answer to one prompt."""

    prompt_ids: list[int]
    tokens: list[int]
    gaps: list[float]
    """Distance of the two best logits at each token."""
    logits: list[tuple[int, float]]
    """The 8 best (token, logit) of the first new token."""

    def first_difference(self, tokens: list[int], gap: float = GAP) -> int | None:
        """Returns the index of the first different token if it counts; after one that does not nothing is compared.

        Args:
            tokens: what to compare.
            gap: a difference counts only where the two best logits of the reference are further apart than this.
        """
        for index, (mine, theirs) in enumerate(zip(tokens, self.tokens, strict=False)):
            if mine != theirs:
                return index if self.gaps[index] > gap else None
        return None


def oracle_available() -> bool:
    """Returns whether .venv-oracle is there (scripts/setup_oracle.sh makes it)."""
    return ORACLE_PYTHON.exists()


@functools.cache
def _result() -> dict:
    """Returns the result of run_transformers.py, from the cache if it is there."""
    model = packaged_model()
    request = {
        "prompts": [dataclasses.asdict(prompt) for prompt in PROMPTS],
        "new_tokens": NEW_TOKENS,
        "texts": list(TEXTS),
    }
    marker = ORACLE_PYTHON.parents[1] / "ready"
    parts = (json.dumps(request).encode(), _SCRIPT.read_bytes(), marker.read_bytes(), model.read_bytes())
    path = made_once("oracle", parts, ".json", lambda path: _ask_transformers(model, request, path))
    return json.loads(path.read_text())


def _ask_transformers(model: Path, request: dict, path: Path) -> None:
    """Runs run_transformers.py, which writes its result to `path`."""
    request_path = path.with_suffix(".request")
    request_path.write_text(json.dumps(request))
    command = [ORACLE_PYTHON, _SCRIPT, model, request_path, path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_SECONDS,
        env=environment,
        cwd=path.parent,
        check=False,
    )
    request_path.unlink()
    if run.returncode:
        raise RuntimeError(f"transformers failed:\n{run.stderr[-4000:]}")


def expected() -> dict[str, Answer]:
    """Returns the reference's answers by prompt name; runs transformers if this machine has not yet."""
    return {name: Answer(**answer) for name, answer in _result()["prompts"].items()}


def expected_text_ids() -> list[list[int]]:
    """Returns the reference's token ids of TEXTS."""
    return _result()["texts"]
