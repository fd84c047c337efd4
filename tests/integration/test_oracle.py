"""Through the three services the demo model answers as transformers does, whatever the company."""

from __future__ import annotations

import asyncio

import pytest

from quire.client import AsyncClient
from tests.integration.stack import Stack
from tests.oracle.expected import expected, oracle_available
from tests.oracle.prompts import NEW_TOKENS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not oracle_available(), reason="no .venv-oracle: run `make oracle-setup`"),
]

GAP = 0.1
"""The executor computes in bfloat16 where the machine is fast at that: see tests/conformance/test_oracle_bf16.py."""


async def _answer(client: AsyncClient, name: str) -> tuple[int, int]:
    """Checks the answer to one prompt; returns its cached tokens and its preemptions."""
    reference = expected()[name]
    result = await client.generate(reference.prompt_ids, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    tokens = list(result.completions[0].token_ids)
    assert len(tokens) == NEW_TOKENS
    assert reference.first_difference(tokens, GAP) is None, name
    return result.usage.cached_token_count, result.usage.preemption_count


async def test_alone(stack: Stack) -> None:
    """A user who compares with transformers must find the same tokens."""
    async with AsyncClient(stack.address, timeout=300) as client:
        for name in expected():
            await _answer(client, name)


async def test_batched_together_and_from_prefix_hits(stack: Stack) -> None:
    """Twenty prompts at once, then once more from the cache: the same tokens."""
    async with AsyncClient(stack.address, timeout=300) as client:
        await asyncio.gather(*(_answer(client, name) for name in expected()))
        again = await asyncio.gather(*(_answer(client, name) for name in expected()))
    lengths = [len(answer.prompt_ids) for answer in expected().values()]
    assert [cached for cached, _ in again] == [length - 1 for length in lengths], "all but one token is cached"


async def test_after_forced_preemption(small_stack: Stack) -> None:
    """A pool of 64 blocks for twenty prompts preempts: the same tokens."""
    async with AsyncClient(small_stack.address, timeout=500) as client:
        results = await asyncio.gather(*(_answer(client, name) for name in expected()))
    assert sum(preemptions for _, preemptions in results) > 0, "the pool was meant to be too small"
    small_stack.wait_idle()
