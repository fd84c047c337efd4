"""Blocks that go to host memory come back as they were, and to nobody else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from execsvc.engine import Engine
from kernels.layout import INT8
from quire import columns
from quire.errors import InvalidRequestError
from tests.unit.execsvc import compiled, tiny
from tests.unit.execsvc.tiny import Driver, start

PROMPT = [(7 * index) % 311 for index in range(40)]


@pytest.fixture(params=[tiny.engine_of, tiny.gpu_engine_of], ids=["cpu", "gpu"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """A driver of an engine with 8 slots in host memory, with the steps of a CPU and of a GPU."""
    make: Callable[..., Engine] = request.param
    return Driver(make(blocks=20, max_num_seqs=4, max_model_len=256, swap_slots=8))


def test_a_sequence_goes_on_from_what_was_swapped_in(driver: Driver) -> None:
    """Otherwise swapping would cost what it is to save: computing everything again. Other blocks, other order."""
    driver.run({1: 40}, added=[start(1, PROMPT, [4, 5, 9])])
    driver.run({1: 1})
    known = [*PROMPT, *driver.tokens[1]]
    # In the step that swaps out, its blocks belong to another one already, which writes them.
    other = start(2, PROMPT[::-1], [4, 5, 9])
    driver.run({2: 40}, removed=[1], swap_out=[4, 3, 9, 1, 5, 4], added=[other])
    back = start(1, known, [12, 2, 15], computed=41)
    driver.run({1: 1, 2: 1}, added=[back], swap_in=[1, 15, 3, 12, 4, 2])
    unbroken = Driver(tiny.engine_of(blocks=20))
    unbroken.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    for _ in range(2):
        unbroken.run({1: 1})
    assert driver.tokens[1] == unbroken.tokens[1]
    assert (driver.logits[1][-1] - unbroken.logits[1][-1]).abs().max() < 1e-4


@pytest.mark.parametrize("variant", compiled.all_variants())
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, INT8], ids=["bf16", "int8"])
def test_panels_of_the_compiled_step_come_back_bit_for_bit(variant: str, kv_dtype: torch.dtype) -> None:
    """Its cache is packed otherwise than torch's: a sequence must not tell that it was away, to the last bit."""
    source = compiled.RoundedSource(tiny.CONFIG)
    sizes = {"blocks": 20, "max_model_len": 256}
    engine = compiled.compiled_engine(source, variant, swap_slots=4, kv_dtype=kv_dtype, **sizes)
    moved = Driver(engine)
    moved.run({1: 40}, added=[start(1, PROMPT, [4, 5, 9])])
    moved.run(removed=[1], swap_out=[4, 3, 9, 1, 5, 2])
    engine._cache.data[1:10].fill_(1)
    moved.run(
        {1: 1}, added=[start(1, [*PROMPT, *moved.tokens[1]], [12, 2, 15], computed=40)], swap_in=[1, 15, 3, 12, 2, 2]
    )
    stayed = Driver(compiled.compiled_engine(source, variant, kv_dtype=kv_dtype, **sizes))
    stayed.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    stayed.run({1: 1})
    assert moved.tokens == stayed.tokens
    assert torch.equal(moved.logits[1][-1], stayed.logits[1][-1])


def test_every_byte_comes_back(driver: Driver) -> None:
    """All layers, keys and values; the slot keeps its content and may be read twice."""
    cache = driver.engine._cache.data
    cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    before = cache.clone()
    driver.run(swap_out=[1, 0, 2, 1, 3, 2, 7, 3])
    driver.run(swap_in=[0, 11, 1, 12, 3, 13], copies=[1, 2])
    driver.run(swap_in=[0, 18])
    for block, source in ((11, 1), (12, 2), (13, 7), (18, 1), (2, 1), (3, 3)):
        assert torch.equal(cache[block], before[source]), block


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({"swap_out": [0, 1]}, "swap_out: a block is out of range"),
        ({"swap_out": [20, 1]}, "allowed is 1 .. 19"),
        ({"swap_out": [1, 8]}, "slot 8 is out of range, there are 8"),
        ({"swap_out": [1, 2, 3, 2]}, "a slot is written twice"),
        ({"swap_in": [2, 5]}, "slot 2 holds nothing"),
        ({"swap_in": [0, 0]}, "swap_in: a block is out of range"),
        ({"swap_in": [0, 5, 1, 5]}, "a block is written twice"),
        ({"swap_in": [0, 5], "copies": [5, 6]}, "or copied in the same step"),
        ({"swap_in": [0, 5], "swap_out": [7, 0]}, "slot 0 holds nothing that a plan of this stream before"),
        ({"swap_in": [0, 5], "owner": 3}, "slot 0 holds nothing"),
        ({"swap_in": [0]}, "swap_in: 4 bytes"),
    ],
)
def test_a_move_that_cannot_be_changes_nothing(driver: Driver, moves: dict[str, list[int]], message: str) -> None:
    """Otherwise a stray column would overwrite a block that somebody else holds."""
    driver.engine._cache.data.fill_(3.0)
    driver.run(swap_out=[1, 0, 2, 1])
    driver.engine._cache.data[1:3] = 4.0
    before = driver.engine._cache.data.clone()
    with pytest.raises(InvalidRequestError, match=message):
        driver.run(removed=[], **moves)  # type: ignore[arg-type]
    assert torch.equal(driver.engine._cache.data, before)


def test_streams_number_their_slots_themselves(driver: Driver) -> None:
    """Two gateways on one executor know nothing of each other: neither may get, or lose, what the other put away."""
    cache = driver.engine._cache.data
    cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    before = cache.clone()
    assert driver.run(swap_out=[1, 0, 2, 1], owner=5).swap_slots_elsewhere == 0
    assert driver.run(swap_out=[3, 0, 4, 1], owner=6).swap_slots_elsewhere == 2
    driver.run(swap_in=[0, 11, 1, 12], owner=5)
    driver.run(swap_in=[1, 13, 0, 14], owner=6)
    for block, source in ((11, 1), (12, 2), (13, 4), (14, 3)):
        assert torch.equal(cache[block], before[source]), block


def test_what_finds_no_place_is_named_and_holds_nothing(driver: Driver) -> None:
    """A gateway that believed it had moved a block would go on from another one's content."""
    assert not driver.run(swap_out=[value for slot in range(6) for value in (slot + 1, slot)], owner=5).swap_refused
    result = driver.run(swap_out=[10, 0, 11, 7, 12, 1, 13, 2], owner=6)
    assert columns.unpack_list(result.swap_refused, "swap_refused") == [1, 2]
    assert result.swap_slots_elsewhere == 6
    with pytest.raises(InvalidRequestError, match="slot 1 holds nothing"):
        driver.run(swap_in=[1, 15], owner=6)
    # What is full is written anew where it is; what is freed is there for others, after the step.
    assert not driver.run(swap_out=[14, 0], swap_freed=[3, 3, 6], owner=5).swap_refused
    assert not driver.run(swap_out=[12, 1], owner=6).swap_refused
    with pytest.raises(InvalidRequestError, match="slot 3 holds nothing"):
        driver.run(swap_in=[3, 15], owner=5)


def test_a_slot_that_is_read_and_freed_in_one_step_is_read_first(driver: Driver) -> None:
    """That is how a sequence comes back: nobody needs its slots from then on."""
    cache = driver.engine._cache.data
    cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    before = cache.clone()
    driver.run(swap_out=[1, 0])
    assert driver.run(swap_in=[0, 9], swap_freed=[0]).swap_slots_elsewhere == 0
    assert torch.equal(cache[9], before[1])


def test_transfers_are_measured_without_a_trace(driver: Driver) -> None:
    """Moving is compared with computing again: a guessed rate is wrong by a hundred from one machine to another."""
    cache = driver.engine._cache.data
    cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    before = cache.clone()
    assert min(driver.engine.measure_swap()) > 0
    assert torch.equal(cache, before)
    assert not driver.run(swap_out=[value for slot in range(8) for value in (slot + 1, slot)]).swap_refused
    assert tiny.engine_of(blocks=20).measure_swap() == (0, 0)


def test_what_a_stream_swapped_out_is_gone_with_it(driver: Driver) -> None:
    """Otherwise the next one could read what it was never granted."""
    driver.run(swap_out=[1, 0], owner=5)
    driver.engine.drop_owner(5)
    with pytest.raises(InvalidRequestError, match="holds nothing"):
        driver.run(swap_in=[0, 3], owner=5)
    driver.run(swap_out=[1, 0])
    driver.engine.begin_epoch(2)
    with pytest.raises(InvalidRequestError, match="holds nothing"):
        driver.run(swap_in=[0, 3], epoch=2)
