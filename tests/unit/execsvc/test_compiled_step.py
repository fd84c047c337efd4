"""The compiled CPU step computes the model, and its results never depend on company."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import pytest
import torch

from execsvc.engine import Engine
from execsvc.model.config import ModelConfig
from tests.unit.execsvc import tiny
from tests.unit.execsvc.compiled import FewBitsSource, RoundedSource, compiled_engine, runnable_variants, torch_engine
from tests.unit.execsvc.tiny import Driver, start

VARIANTS = runnable_variants()
pytestmark = pytest.mark.skipif(not VARIANTS, reason="the CPU step was not compiled: no C++ compiler")
TOKENS = [(7 * index * index + 3 * index) % 320 for index in range(1000)]
TINY = dataclasses.replace(tiny.CONFIG, num_layers=2)
CONFIGS = {
    "llama": TINY,
    "llama-tied": dataclasses.replace(TINY, tie_word_embeddings=True, num_heads=3, num_kv_heads=3, vocab_size=333),
    "mistral": dataclasses.replace(TINY, architecture="MistralForCausalLM", sliding_window=37, head_dim=48),
    "qwen2": dataclasses.replace(TINY, architecture="Qwen2ForCausalLM", qkv_bias=True, head_dim=16, hidden_size=80),
    "qwen3": dataclasses.replace(TINY, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128, num_kv_heads=1),
}
TOLERANCE = {"avx512_bf16": 0.3, "portable_bf16": 0.3}
"""Absolute, of logits up to 6: these variants round activations to bfloat16; measured 0.18."""
FLOAT_TOLERANCE = 0.005
"""The others round the same keys and values as the reference; now and then one falls the other way: 0.0008."""


def blocks_of(table: int, length: int, block_size: int = 16) -> list[int]:
    """Returns blocks for a sequence, in no order that helps."""
    count = -(-length // block_size)
    return [
        1 + table * count + (index * 7) % count if count % 7 else 1 + table * count + index for index in range(count)
    ]


def answer(engine: Engine, chunks: list[int], length: int, table: int = 1) -> torch.Tensor:
    """Returns the logits after `length` tokens that are computed in `chunks`, the last one repeated."""
    driver = Driver(engine)
    sizes = itertools.chain(chunks, itertools.repeat(chunks[-1]))
    driver.run(added=[start(table, TOKENS[:length], blocks_of(0, length, engine.block_size))])
    done = 0
    while done < length:
        count = min(next(sizes), length - done)
        assert not driver.run({table: count}).errors
        done += count
    return driver.logits[table][0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_computes_the_model(variant: str, name: str) -> None:
    """A user's answers would be another model's if a size, a bias, a norm or a window were misread."""
    config = CONFIGS[name]
    expected = answer(torch_engine(RoundedSource(config)), [100], 100)
    block_size = {"llama": 16, "mistral": 32}.get(name, 64)
    found = answer(compiled_engine(RoundedSource(config), variant, block_size=block_size), [100], 100)
    assert float((found - expected).abs().max()) < TOLERANCE.get(variant, FLOAT_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunks_threads_and_company_change_no_bit(variant: str, name: str) -> None:
    """A prompt's answer would change with who else is served, or after a preemption."""
    source, length = RoundedSource(CONFIGS[name]), 310
    whole = answer(compiled_engine(source, variant), [length], length)
    for chunks in ([37], [64, 1, 1, 100], [1]):
        assert torch.equal(answer(compiled_engine(source, variant), chunks, length), whole), chunks
    assert torch.equal(answer(compiled_engine(source, variant, threads=3), [length], length), whole)
    assert torch.equal(answer(compiled_engine(source, variant, block_size=64), [55], length), whole)
    driver = Driver(compiled_engine(source, variant, threads=2, blocks=400))
    others = {table: 20 + 21 * table for table in range(2, 15)}
    added = [start(table, TOKENS[table : table + count], blocks_of(table, 310)) for table, count in others.items()]
    driver.run(others, added=[*added, start(1, TOKENS[:length], blocks_of(0, length))])
    driver.run(dict.fromkeys(others, 1) | {1: length - 1})
    driver.run(dict.fromkeys([*others, 1], 1))
    assert torch.equal(driver.logits[1][0], whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_long_context_that_threads_share_changes_no_bit(variant: str, name: str) -> None:
    """One user's long conversation is cut into tiles for several threads: the answer would depend on their number."""
    config = dataclasses.replace(CONFIGS[name], sliding_window=900 if name == "mistral" else 0)
    expected = answer(compiled_engine(RoundedSource(config), variant), [999, 1], 1000)
    for threads in (2, 3, 5):
        found = answer(compiled_engine(RoundedSource(config), variant, threads=threads), [999, 1], 1000)
        assert torch.equal(found, expected), threads


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_in_company_changes_no_bit(variant: str) -> None:
    """A sequence's tokens would depend on how many others are decoded in the same step."""
    source = RoundedSource(TINY)
    alone = Driver(compiled_engine(source, variant))
    alone.run({1: 40}, added=[start(1, TOKENS[:40], [5, 3, 9, 2])])
    together = Driver(compiled_engine(source, variant, threads=2))
    added = [start(table, TOKENS[:40], [4 * table + index for index in range(4)]) for table in range(1, 12)]
    together.run(dict.fromkeys(range(1, 12), 40), added=added)
    for _ in range(20):
        alone.run({1: 1})
        together.run(dict.fromkeys(range(1, 12), 1))
    for table in range(1, 12):
        assert together.tokens[table] == alone.tokens[1]
        assert all(map(torch.equal, together.logits[table], alone.logits[1]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefix_hit_and_a_copied_block_change_no_bit(variant: str) -> None:
    """A prompt that finds its beginning in the cache, or in a copied block, would get another answer."""
    source = RoundedSource(TINY)
    whole = answer(compiled_engine(source, variant), [70], 70)
    driver = Driver(compiled_engine(source, variant))
    driver.run({1: 70}, added=[start(1, TOKENS[:70], [8, 6, 4, 2, 1])])
    driver.run({2: 22}, added=[start(2, TOKENS[:70], [8, 6, 4, 10, 11], computed=48)])
    driver.run({3: 1}, added=[start(3, TOKENS[:70], [8, 6, 4, 2, 20], computed=69)], copies=[1, 20])
    for table in (1, 2, 3):
        assert torch.equal(driver.logits[table][0], whole), table


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [17, 33, 40, 47])
def test_what_a_block_held_before_cannot_be_seen(variant: str, length: int) -> None:
    """Not-a-number that one sequence left in a block would fail whoever gets the block next."""
    source = RoundedSource(TINY)
    expected = answer(compiled_engine(source, variant), [9], length)
    engine = compiled_engine(source, variant)
    engine._cache.data[1:].fill_(float("nan"))
    assert torch.equal(answer(engine, [9], length), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_that_are_not_finite_fail_one_sequence(variant: str) -> None:
    """One sequence with a broken cache must not fail the others of its step, nor sample garbage."""
    driver = Driver(compiled_engine(RoundedSource(TINY), variant))
    driver.run({1: 20, 2: 20}, added=[start(1, TOKENS[:20], [1, 2]), start(2, TOKENS[:20], [3, 4])])
    driver.engine._cache.data[3].fill_(float("nan"))
    result = driver.run({1: 1, 2: 1})
    assert [(error.table, error.reason) for error in result.errors] == [(2, "LOGITS_NOT_FINITE")]
    assert len(driver.tokens[1]) == 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_few_bits_are_the_file_s_own_in_any_batch(variant: str, tied: bool) -> None:
    """A model in 4 bits would get other weights, or others for many rows than for one."""
    source = FewBitsSource(dataclasses.replace(TINY, tie_word_embeddings=tied))
    expected = answer(torch_engine(source), [100], 100)
    whole = answer(compiled_engine(source, variant), [100], 100)
    assert float((whole - expected).abs().max()) < TOLERANCE.get(variant, FLOAT_TOLERANCE)
    for chunks in ([1], [3, 12, 5], [40]):
        assert torch.equal(answer(compiled_engine(source, variant, threads=2), chunks, 100), whole), chunks


def test_two_models_compute_side_by_side() -> None:
    """Two executors in one process would overwrite each other's work in memory that they share."""
    configs: list[ModelConfig] = [CONFIGS["llama"], CONFIGS["qwen2"]]
    expected = [answer(compiled_engine(RoundedSource(config), VARIANTS[0]), [90], 90) for config in configs]
    engines = [compiled_engine(RoundedSource(config), VARIANTS[0], threads=2) for config in configs]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def repeat(index: int) -> None:
        for table in range(1, 6):
            found[index].append(answer(engines[index], [7], 90, table))

    workers = [threading.Thread(target=repeat, args=(index,)) for index in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index in (0, 1):
        assert len(found[index]) == 5
        assert all(torch.equal(logits, expected[index]) for logits in found[index])


def test_greedy_tokens_are_the_first_of_the_largest_logits() -> None:
    """The token that the step names must be the one that sampling from the logits gives."""
    driver = Driver(compiled_engine(RoundedSource(TINY), VARIANTS[0]))
    driver.run({1: 30}, added=[start(1, TOKENS[:30], [1, 2, 3, 4])])
    for _ in range(10):
        driver.run({1: 1})
    assert driver.tokens[1] == [int(logits.argmax()) for logits in driver.logits[1]]
