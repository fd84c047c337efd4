"""The compiled CPU step computes the model, and its results never depend on company."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading

import pytest
import torch

from execsvc.engine import Engine
from execsvc.model.config import ModelConfig
from execsvc.model.few_bits import quantise
from kernels.cpu import reference
from kernels.layout import INT8
from tests.native import emulation
from tests.unit.execsvc import tiny
from tests.unit.execsvc.compiled import (
    FewBitsSource,
    RoundedSource,
    all_variants,
    compiled_engine,
    emulated_variants,
    torch_engine,
)
from tests.unit.execsvc.tiny import Driver, start

VARIANTS, EMULATED = all_variants(), emulated_variants()
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
TOLERANCE = {"amx_bf16": 0.3, "avx512_bf16": 0.3, "portable_bf16": 0.3}
"""Absolute, of logits up to 6: these variants round activations to bfloat16; measured 0.18."""
FLOAT_TOLERANCE = 0.005
"""The others round the same keys and values as the reference; now and then one falls the other way: 0.0026."""
STEPS_APART = 0.3
"""What 8-bit integers may add where activations are rounded: more keys and values fall the other way. Together 0.45."""


QUANTISED_TOLERANCE = 1e-4
"""Float variants against torch on the same 8-bit integers; measured 0.00001, of logits up to 8."""
CACHES = pytest.mark.parametrize("kv_dtype", [torch.bfloat16, INT8], ids=["bf16", "int8"])


def spoil(blocks: torch.Tensor) -> None:
    """Makes what blocks hold not-a-number: the values, or the scales (whose bits are then all ones)."""
    blocks.fill_(-1 if blocks.dtype == INT8 else float("nan"))


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
@CACHES
def test_every_variant_computes_the_model(variant: str, name: str, kv_dtype: torch.dtype) -> None:
    """A user's answers would be another model's if a size, a bias, a norm or a window were misread."""
    config = CONFIGS[name]
    expected = answer(torch_engine(RoundedSource(config), kv_dtype), [100], 100)
    block_size = {"llama": 16, "mistral": 32}.get(name, 64)
    engine = compiled_engine(RoundedSource(config), variant, block_size=block_size, kv_dtype=kv_dtype)
    tolerance = TOLERANCE.get(variant, FLOAT_TOLERANCE)
    if kv_dtype == INT8 and variant in TOLERANCE:
        tolerance += STEPS_APART
    assert float((answer(engine, [100], 100) - expected).abs().max()) < tolerance


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@CACHES
def test_chunks_threads_and_company_change_no_bit(variant: str, name: str, kv_dtype: torch.dtype) -> None:
    """A prompt's answer would change with who else is served, or after a preemption."""
    length = 310
    engine = functools.partial(compiled_engine, RoundedSource(CONFIGS[name]), variant, kv_dtype=kv_dtype)
    whole = answer(engine(), [length], length)
    for chunks in ([37], [64, 1, 1, 100], [1]):
        assert torch.equal(answer(engine(), chunks, length), whole), chunks
    assert torch.equal(answer(engine(threads=3), [length], length), whole)
    assert torch.equal(answer(engine(block_size=64), [55], length), whole)
    driver = Driver(engine(threads=2, blocks=400))
    others = {table: 20 + 21 * table for table in range(2, 15)}
    added = [start(table, TOKENS[table : table + count], blocks_of(table, 310)) for table, count in others.items()]
    driver.run(others, added=[*added, start(1, TOKENS[:length], blocks_of(0, length))])
    driver.run(dict.fromkeys(others, 1) | {1: length - 1})
    driver.run(dict.fromkeys([*others, 1], 1))
    assert torch.equal(driver.logits[1][0], whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@CACHES
def test_a_long_context_that_threads_share_changes_no_bit(variant: str, name: str, kv_dtype: torch.dtype) -> None:
    """One user's long conversation is cut into tiles for several threads: the answer would depend on their number."""
    config = dataclasses.replace(CONFIGS[name], sliding_window=900 if name == "mistral" else 0)
    engine = functools.partial(compiled_engine, RoundedSource(config), variant, kv_dtype=kv_dtype)
    expected = answer(engine(), [999, 1], 1000)
    # Emulated instructions are slow: one number of threads has to do.
    for threads in (3,) if variant in EMULATED else (2, 3, 5):
        assert torch.equal(answer(engine(threads=threads), [999, 1], 1000), expected), threads


@pytest.mark.parametrize("variant", VARIANTS)
@CACHES
def test_decoding_in_company_changes_no_bit(variant: str, kv_dtype: torch.dtype) -> None:
    """A sequence's tokens would depend on how many others are decoded in the same step."""
    source = RoundedSource(TINY)
    alone = Driver(compiled_engine(source, variant, kv_dtype=kv_dtype))
    alone.run({1: 40}, added=[start(1, TOKENS[:40], [5, 3, 9, 2])])
    together = Driver(compiled_engine(source, variant, threads=2, kv_dtype=kv_dtype))
    added = [start(table, TOKENS[:40], [4 * table + index for index in range(4)]) for table in range(1, 12)]
    together.run(dict.fromkeys(range(1, 12), 40), added=added)
    for _ in range(20):
        alone.run({1: 1})
        together.run(dict.fromkeys(range(1, 12), 1))
    for table in range(1, 12):
        assert together.tokens[table] == alone.tokens[1]
        assert all(map(torch.equal, together.logits[table], alone.logits[1]))


@pytest.mark.parametrize("variant", VARIANTS)
@CACHES
def test_a_prefix_hit_and_a_copied_block_change_no_bit(variant: str, kv_dtype: torch.dtype) -> None:
    """A prompt that finds its beginning in the cache, or in a copied block, would get another answer."""
    source = RoundedSource(TINY)
    whole = answer(compiled_engine(source, variant, kv_dtype=kv_dtype), [70], 70)
    driver = Driver(compiled_engine(source, variant, kv_dtype=kv_dtype))
    driver.run({1: 70}, added=[start(1, TOKENS[:70], [8, 6, 4, 2, 1])])
    driver.run({2: 22}, added=[start(2, TOKENS[:70], [8, 6, 4, 10, 11], computed=48)])
    driver.run({3: 1}, added=[start(3, TOKENS[:70], [8, 6, 4, 2, 20], computed=69)], copies=[1, 20])
    for table in (1, 2, 3):
        assert torch.equal(driver.logits[table][0], whole), table


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [17, 33, 40, 47])
@CACHES
def test_what_a_block_held_before_cannot_be_seen(variant: str, length: int, kv_dtype: torch.dtype) -> None:
    """Not-a-number that one sequence left in a block would fail whoever gets the block next."""
    source = RoundedSource(TINY)
    expected = answer(compiled_engine(source, variant, kv_dtype=kv_dtype), [9], length)
    engine = compiled_engine(source, variant, kv_dtype=kv_dtype)
    spoil(engine._cache.data[1:])
    assert torch.equal(answer(engine, [9], length), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@CACHES
def test_logits_that_are_not_finite_fail_one_sequence(variant: str, kv_dtype: torch.dtype) -> None:
    """One sequence with a broken cache must not fail the others of its step, nor sample garbage."""
    driver = Driver(compiled_engine(RoundedSource(TINY), variant, kv_dtype=kv_dtype))
    driver.run({1: 20, 2: 20}, added=[start(1, TOKENS[:20], [1, 2]), start(2, TOKENS[:20], [3, 4])])
    spoil(driver.engine._cache.data[3])
    result = driver.run({1: 1, 2: 1})
    assert [(error.table, error.reason) for error in result.errors] == [(2, "LOGITS_NOT_FINITE")]
    assert len(driver.tokens[1]) == 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_to_8_bit_integers_is_that_to_what_they_stand_for(variant: str, block_size: int) -> None:
    """A scale of another position, head or block, or one too many in the softmax, would blur what a model has read.

    Torch continues from what the compiled step has written, so nothing is rounded twice.
    """
    length, source = 90, RoundedSource(TINY)
    engine = compiled_engine(source, variant, block_size=block_size, kv_dtype=INT8)
    expected = torch_engine(source, INT8)
    first, last = (start(1, TOKENS[:length], blocks_of(0, length, size)) for size in (block_size, 16))
    driver = Driver(engine)
    driver.run({1: length - 1}, added=[first])
    heads = reference.dequantise(*reference.read_cache(engine._cache.data))
    # [position of the sequence, layer, 2, kv_head, head_dim], then the blocks of the other engine.
    lines = torch.cat([heads[block].movedim(-2, 0) for block in blocks_of(0, length, block_size)])
    for index, block in enumerate(blocks_of(0, length)):
        part = lines[16 * index : 16 * index + 16].movedim(0, -2)
        expected._cache.data[block][..., : part.shape[-2], :] = part
    last.computed_token_count = length - 1
    other = Driver(expected)
    driver.run({1: 1})
    other.run({1: 1}, added=[last])
    error = float((driver.logits[1][-1] - other.logits[1][0]).abs().max())
    assert error < TOLERANCE.get(variant, QUANTISED_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_rounded_to_the_nearest_of_255_numbers(variant: str) -> None:
    """Integers that are off, or a scale that is not the head's own, would cost more than the half step of rounding."""
    config = dataclasses.replace(TINY, num_layers=1)
    source, prompt = RoundedSource(config), start(1, TOKENS[:40], [3, 1, 2])
    engines = torch_engine(source, torch.float32), compiled_engine(source, variant, kv_dtype=INT8)
    for engine in engines:
        Driver(engine).run({1: 40}, added=[prompt])
    expected, expected_scales = reference.quantise(engines[0]._cache.data[1:4])
    quants, scales = reference.read_cache(engines[1]._cache.data[1:4])
    loose = variant in TOLERANCE
    assert torch.allclose(scales, expected_scales, rtol=0.02 if loose else 1e-4)
    assert int(quants.abs().max()) == 127
    assert int((quants.int() - expected.int()).abs().max()) <= (4 if loose else 1)
    if not loose:
        assert float((quants != expected).float().mean()) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_and_what_is_not_finite_stay_so_in_8_bits(variant: str) -> None:
    """A head of zeros must not become not-a-number, nor not-a-number become zeros that look like an answer."""
    config = dataclasses.replace(TINY, num_layers=1)

    class Spoilt(RoundedSource):
        """The value projection is all zeros, or one weight of it is not finite."""

        number = 0.0

        def load(self, name: str) -> torch.Tensor:
            tensor = super().load(name)
            if "v_proj" in name:
                tensor.zero_()
                tensor[0, 0] = self.number
            return tensor

    for number in (0.0, float("inf"), float("nan")):
        Spoilt.number = number
        driver = Driver(compiled_engine(Spoilt(config), variant, kv_dtype=INT8))
        result = driver.run({1: 20}, added=[start(1, TOKENS[:20], [1, 2])])
        reasons = [error.reason for error in result.errors]
        assert reasons == ([] if number == 0.0 else ["LOGITS_NOT_FINITE"]), number


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_rounded_at_load_are_those_of_every_batch(variant: str, bits: int) -> None:
    """The model that is served must be the one that was rounded, whatever the number of rows."""

    class Rounded(RoundedSource):
        """Has what rounding leaves of its matrices."""

        def load(self, name: str) -> torch.Tensor:
            weight = super().load(name)
            if weight.ndim == 1:
                return weight
            return quantise(weight, 8 if "embed" in name or "lm_head" in name else bits).dequantise()

    expected = answer(torch_engine(Rounded(TINY)), [100], 100)
    whole = answer(compiled_engine(RoundedSource(TINY), variant, bits=bits), [100], 100)
    assert float((whole - expected).abs().max()) < TOLERANCE.get(variant, FLOAT_TOLERANCE)
    assert torch.equal(answer(compiled_engine(RoundedSource(TINY), variant, bits=bits, threads=2), [40], 100), whole)


@pytest.mark.parametrize("name", emulation.VARIANTS)
@pytest.mark.parametrize("source", [RoundedSource(TINY), FewBitsSource(TINY)], ids=["bf16", "few-bits"])
@CACHES
def test_emulated_instructions_give_the_processor_s_own_bits(
    name: str, source: RoundedSource | FewBitsSource, kv_dtype: torch.dtype
) -> None:
    """What the other tests show of an emulated variant would say nothing of the one that is served."""
    if emulation.obstacle() or not emulation.runs(name):
        pytest.skip(emulation.obstacle() or f"this processor does not run {name} to compare with")
    for chunks in ([100], [37, 1, 1, 50]):
        real, emulated = (
            answer(compiled_engine(source, name, kv_dtype=kv_dtype, emulated=which), chunks, 300)
            for which in (False, True)
        )
        assert torch.equal(real, emulated), chunks


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
