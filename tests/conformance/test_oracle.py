"""Our answers against those of transformers on the same weights in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer
import torch

from execsvc.model.source import open_model
from tests.oracle.expected import TEXTS, Answer, expected, expected_text_ids, oracle_available
from tests.oracle.prompts import NEW_TOKENS, PROMPTS
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import Driver, start

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not oracle_available(), reason="no .venv-oracle: run scripts/setup_oracle.sh"),
]
LOGIT_TOLERANCE = 0.002
"""Absolute, float32 on both sides with another order of summation; measured 0.0002."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Computes on one thread: others run beside this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def answers() -> dict[str, Answer]:
    """The reference."""
    return expected()


def test_the_tokenizer_gives_the_reference_s_ids() -> None:
    """Otherwise a model would read another text than the user wrote."""
    source = open_model("smollm2")
    tokenizer = Tokenizer.from_str(source.tokenizer.json)
    source.close()
    for text, ids in zip(TEXTS, expected_text_ids(), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_greedy_tokens_equal_the_reference(answers: dict[str, Answer]) -> None:
    """Otherwise users would get something else than the model they asked for.

    All prompts run together, the long ones in chunks, so batching and chunking are covered as well.
    """
    driver = Driver(tiny.engine_of(tiny.smollm2(), blocks=900, max_num_batched_tokens=512))
    names = {table: prompt.name for table, prompt in enumerate(PROMPTS)}
    added, next_block = [], 1
    for table, name in names.items():
        ids = answers[name].prompt_ids
        count = (len(ids) + NEW_TOKENS) // 16 + 1
        added.append(start(table, ids, range(next_block, next_block + count)))
        next_block += count
    left = {table: len(answers[name].prompt_ids) for table, name in names.items()}
    driver.run(added=added)
    while any(len(driver.tokens.get(table, [])) < NEW_TOKENS for table in names):
        budget, scheduled = 512, {}
        for table in names:
            count = min(left[table] or int(len(driver.tokens.get(table, [])) < NEW_TOKENS), 300, budget)
            if count:
                scheduled[table] = count
                budget -= count
                left[table] = max(0, left[table] - count)
        assert not driver.run(scheduled).errors
    for table, name in names.items():
        difference = answers[name].first_difference(driver.tokens[table])
        assert difference is None, f"{name}: token {difference} differs"
        first = driver.logits[table][0]
        error = max(abs(float(first[token]) - value) for token, value in answers[name].logits)
        assert error < LOGIT_TOLERANCE, f"{name}: logits are off by {error}"
