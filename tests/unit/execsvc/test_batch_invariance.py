"""The same request gives the same bits whatever it is computed with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from execsvc.model.llama import Llama
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import Driver, start

PROMPT = [(7 * index) % 311 for index in range(300)]
NEW_TOKENS = 4


def answer(driver: Driver, table: int, chunks: list[int], first_block: int, tokens: list[int]) -> list[torch.Tensor]:
    """Prefills `tokens` in chunks, decodes, and returns the logits of each new token."""
    blocks = range(first_block, first_block + (len(tokens) + NEW_TOKENS) // 16 + 1)
    added = [start(table, tokens, list(blocks))]
    for chunk in chunks:
        driver.run({table: chunk}, added=added)
        added = []
    for _ in range(NEW_TOKENS - 1):
        driver.run({table: 1})
    driver.run(removed=[table])
    return driver.logits.pop(table)


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two lists of logits are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("chunks", [[100, 100, 100], [256, 44], [37] * 8 + [4], [1] * 300, [299, 1]])
def test_a_prompt_in_chunks_is_bitwise_the_prompt_whole(chunks: list[int]) -> None:
    """Otherwise chunked prefill, a prefix hit or a preemption would change what a user reads."""
    whole = answer(Driver(tiny.engine_of()), 1, [300], 1, PROMPT)
    assert equal(whole, answer(Driver(tiny.engine_of()), 1, chunks, 50, PROMPT))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257])
def test_odd_lengths_are_bitwise_equal_too(length: int) -> None:
    """Otherwise a prompt that just fills a block or a tile would answer differently."""
    tokens = PROMPT[:length]
    whole = answer(Driver(tiny.engine_of()), 1, [length], 1, tokens)
    assert equal(whole, answer(Driver(tiny.engine_of()), 1, [1] * length, 3, tokens))


def test_company_changes_no_bit() -> None:
    """Otherwise the same request would answer differently on a busy server."""
    alone = answer(Driver(tiny.engine_of()), 9, [300], 1, PROMPT)
    driver = Driver(tiny.engine_of())
    others = {table: 20 + 31 * table for table in range(8)}
    added = [start(table, PROMPT[3 : 3 + n], range(1 + 20 * table, 20 + 20 * table)) for table, n in others.items()]
    driver.run({**others}, added=added)
    driver.run({**dict.fromkeys(others, 1), 9: 150}, added=[start(9, PROMPT, range(200, 230))])
    driver.run({9: 150, 3: 1, 5: 1})
    for _ in range(NEW_TOKENS - 1):
        driver.run(dict.fromkeys([0, 1, 9, 4, 7], 1))
    assert equal(alone, driver.logits[9])


def test_threads_change_no_bit() -> None:
    """Otherwise a machine with other cores would resume a stream with another text."""
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(answer(Driver(tiny.engine_of()), 1, [300], 1, PROMPT))
    assert equal(*results)


def test_stale_slots_are_never_read() -> None:
    """Otherwise a block's former owner would show through, or a NaN of his would ruin a stranger's answer."""
    clean = answer(Driver(tiny.engine_of()), 1, [100, 200], 1, PROMPT)
    engine = tiny.engine_of()
    engine._cache.data[1:].fill_(float("nan"))
    assert equal(clean, answer(Driver(engine), 1, [100, 200], 1, PROMPT))


@pytest.fixture(scope="module")
def smollm2() -> Llama:
    """The packaged model."""
    return tiny.smollm2()


def test_the_real_model_is_bitwise_invariant(smollm2: Llama) -> None:
    """Otherwise the promise would hold for toys only: shapes decide which code the matrix library takes."""
    tokens = [(31 * index) % 40_000 for index in range(70)]
    whole = answer(Driver(tiny.engine_of(smollm2, blocks=60)), 1, [70], 1, tokens)
    chunked = answer(Driver(tiny.engine_of(smollm2, blocks=60)), 1, [33, 36, 1], 20, tokens)
    driver = Driver(tiny.engine_of(smollm2, blocks=60))
    driver.run({5: 9, 6: 21}, added=[start(5, tokens[:9], [40, 41]), start(6, tokens[5:26], [45, 46])])
    driver.run({1: 70, 5: 1, 6: 1}, added=[start(1, tokens, range(1, 8))])
    for _ in range(NEW_TOKENS - 1):
        driver.run({6: 1, 1: 1, 5: 1})
    assert equal(whole, chunked)
    assert equal(whole, driver.logits[1])
