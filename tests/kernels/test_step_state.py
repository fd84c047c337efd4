"""The state on the device: kernels equal their reference bit for bit, and a whole engine runs on Triton."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from execsvc.gpu.runtime import CudaRuntime, Runtime
from execsvc.grammars import Grammars
from execsvc.model import llama
from kernels.step_state import reference
from kernels.step_state.tensors import Resident, Staged
from quire import columns
from tests.unit.execsvc import tiny
from tests.unit.execsvc.recorded_graphs import RecordingRuntime
from tests.unit.execsvc.test_grammars import EOS_TOKEN, JSON
from tests.unit.execsvc.tiny import Driver, start


@pytest.fixture
def state(kernels: Any) -> Any:
    """The host functions."""
    return importlib.import_module("kernels.step_state.state")


def _runtime(device: torch.device) -> Runtime:
    """A GPU's own graphs where there is one, recorded ones elsewhere."""
    return RecordingRuntime() if device.type == "cpu" else CudaRuntime(torch.device("cuda", 0))


def _resident(row_count: int, block_max: int, device: torch.device) -> Resident:
    """Returns state with distinct content and sensible positions."""
    resident = Resident.allocate(row_count, block_max, device)
    resident.state.copy_(torch.arange(len(resident.state), device=device) + 1000)
    resident.computed.copy_(torch.arange(row_count, device=device) * 13 % (block_max * 16))
    return resident


@pytest.mark.parametrize("count", [1, 255, 256, 300])
def test_writes_land_where_they_should(state: Any, device: torch.device, count: int) -> None:
    """A change in the wrong place is another sequence's block table."""
    offsets = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:count].int().to(device)
    values = torch.arange(count, dtype=torch.int32, device=device) + 5000
    expected, found = (torch.arange(1000, dtype=torch.int32, device=device) for _ in range(2))
    reference.apply_writes(expected, offsets, values)
    state.apply_writes(found, offsets, values)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block_max", [3, 1030])
def test_a_batch_is_staged_as_the_reference_does(state: Any, device: torch.device, block_max: int) -> None:
    """Positions at both sides of a block's end, padding in the middle, tables longer than a program's share."""
    resident = _resident(9, block_max, device)
    resident.computed[:4] = torch.tensor([0, 15, 16, block_max * 16 - 1], device=device)
    rows = torch.tensor([3, -1, 0, 8, 2, 1, -1], dtype=torch.int32, device=device)
    expected, found = (Staged.allocate(len(rows), block_max, device) for _ in range(2))
    found.tables.fill_(-7)
    reference.stage_decode(resident, rows, expected, 16)
    state.stage_decode(resident, rows, found, 16)
    for name in ("tokens", "positions", "slots", "lens", "params"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for place, length in enumerate(expected.lens.tolist()):
        used = -(-length // 16)
        assert torch.equal(found.tables[place, :used], expected.tables[place, :used])
        assert (found.tables[place, used:] == -7).all()


def test_rows_advance_and_padding_does_not(state: Any, device: torch.device) -> None:
    """A sequence that does not sample keeps its token; an impossible token never becomes an input."""
    expected, found = _resident(9, 3, device), _resident(9, 3, device)
    rows = torch.tensor([3, -1, 0, 8], dtype=torch.int32, device=device)
    lens = torch.tensor([11, 12, 13, 14], dtype=torch.int32, device=device)
    places = torch.tensor([1, 0, -1, 2], dtype=torch.int32, device=device)
    sampled = torch.tensor([70, 71, -1], dtype=torch.int32, device=device)
    before = expected.state.clone()
    reference.advance(expected, rows, lens, sampled, places)
    state.advance(found, rows, lens, sampled, places)
    assert torch.equal(found.state, expected.state)
    assert found.tokens[[3, 0, 8]].tolist() == [71, int(before.view(-1)[27 + 9]), 0]
    assert int((found.state != before).sum()) == 5
    state.advance(found, rows[:0], lens[:0], sampled, places[:0])


def test_wrong_arguments_are_named(state: Any, device: torch.device) -> None:
    """A caller must learn which argument does not fit before anything is written."""
    resident = _resident(2, 3, device)
    two, three = (torch.zeros(count, dtype=torch.int32, device=device) for count in (2, 3))
    with pytest.raises(ValueError, match="values"):
        state.apply_writes(resident.state, two, three)
    with pytest.raises(ValueError, match="rows"):
        state.stage_decode(resident, torch.zeros(2, device=device), Staged.allocate(2, 3, device), 16)
    with pytest.raises(ValueError, match="at most"):
        Resident.allocate(2**20, 2**12, device)


def test_an_engine_on_the_kernels_gives_the_tokens_of_the_torch_engine(kernels: Any, device: torch.device) -> None:
    """The kernels together, in captured graphs: prefill, decode, a step of both, a new block."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=1)
    prompts = {1: [(7 * i) % 311 for i in range(31)], 2: [(5 * i) % 311 for i in range(16)]}
    replayed = tiny.gpu_engine_of(
        config, operations="triton", runtime=_runtime(device), sizes=[2], max_num_seqs=2, blocks=12, max_model_len=64
    )
    drivers = [Driver(tiny.engine_of(config, blocks=12)), Driver(replayed)]
    for driver in drivers:
        driver.run({1: 20}, added=[start(1, prompts[1], [1, 3])])
        driver.run({1: 11, 2: 16}, added=[start(2, prompts[2], [7, 8], temperature=0.7, seed=3)])
        driver.run({1: 1, 2: 1})
        driver.run({2: 1, 1: 1}, appended=[1, 2, 5])
        driver.run({1: 1})
    assert drivers[0].tokens == drivers[1].tokens
    for table, logits in drivers[0].logits.items():
        for mine, theirs in zip(logits, drivers[1].logits[table], strict=True):
            assert (mine.cpu() - theirs.cpu()).abs().max() < 1e-3


def test_an_engine_on_the_kernels_chooses_as_the_host_whatever_is_asked_for(kernels: Any, device: torch.device) -> None:
    """Penalties, bias, typical_p, log-probabilities, withheld tokens, a grammar, siblings: captured, in one batch."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=1)
    starts = [
        start(1, [5] * 9, [1], repetition_penalty=1.3, frequency_penalty=0.4, prompt_token_count=9, logprobs=3),
        start(2, [7, 8, 9], [2], temperature=1.5, typical_p=0.6, seed=3, sibling_seeds=[4, 5], logprobs=0),
        start(3, [1, 2], [3], prompt_token_count=2, prompt_logprobs=2, temperature=1.0),
    ]
    starts[0].sampling.bias_tokens, starts[0].sampling.bias_values = columns.pack([5, 70]), columns.pack_floats([9, 3])
    starts[1].sampling.withheld_tokens, starts[1].sampling.withheld_until = columns.pack([0, 100, 319]), 5
    starts[2].sampling.grammar = 'start: /[a-f]{2,9}/ "-" /[0-9]{3,7}/'
    replayed = tiny.gpu_engine_of(
        config, operations="triton", runtime=_runtime(device), sizes=[3], max_num_seqs=3, blocks=12, max_model_len=64
    )
    found = []
    for engine in (tiny.engine_of(config, blocks=12), replayed):
        engine.grammars = Grammars(JSON, config.vocab_size, [EOS_TOKEN])
        driver = Driver(engine)
        results = [driver.run({1: 9, 2: 3, 3: 2}, added=starts)]
        results += [driver.run({1: 1, 2: 1, 3: 1}) for _ in range(3)]
        found.append(results)
    for mine, theirs in zip(*found, strict=True):
        assert not mine.errors
        for field in ("sampled_tables", "sampled_tokens", "sibling_tables", "sibling_tokens"):
            assert getattr(mine, field) == getattr(theirs, field), field
        for field in ("tables", "positions", "ranks", "counts", "token_ids"):
            assert getattr(mine.logprobs, field) == getattr(theirs.logprobs, field), field
        values = [columns.unpack_floats(result.logprobs.values, "") for result in (mine, theirs)]
        assert values[0] and values[0] == pytest.approx(values[1], abs=1e-3)
    assert found[0][0].sibling_tables == columns.pack([2, 2])


def test_a_float8_cache_with_measured_scales_holds_what_would_saturate(kernels: Any, device: torch.device) -> None:
    """Values above 448 are cut off without a scale: the first prompt's must keep them, in replays, too."""

    class LargeValues(tiny.RandomSource):
        """Values of hundreds."""

        def load(self, name: str) -> torch.Tensor:
            """Returns a tensor."""
            return super().load(name) * (500.0 if "v_proj" in name else 1.0)

    config = dataclasses.replace(tiny.CONFIG, num_layers=1)
    found = []
    for kv_dtype, calculated in ((torch.float32, False), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)):
        engine = tiny.gpu_engine_of(
            llama.load(LargeValues(config), torch.float32, device, 64), operations="triton",
            runtime=_runtime(device), sizes=[1], kv_dtype=kv_dtype, max_num_seqs=1, blocks=4, max_model_len=64,
        )  # fmt: skip
        if calculated:
            engine.calculate_kv_scales()
        driver = Driver(engine)
        driver.run({1: 18}, added=[start(1, [(7 * i) % 311 for i in range(18)], [1, 3])])
        driver.run({1: 1})
        found.append(torch.stack(driver.logits[1]))
    errors = [float((found[0] - other).norm() / found[0].norm()) for other in found[1:]]
    assert 0 < errors[0] < 0.1 < errors[1], errors


def test_a_float8_cache_gives_logits_near_those_of_a_wide_one(kernels: Any, device: torch.device) -> None:
    """Twice the tokens in the same memory are worth nothing if the answers are off."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=1)
    found = []
    for kv_dtype in (torch.float32, torch.float8_e4m3fn):
        limits = {"max_num_seqs": 1, "blocks": 4, "max_model_len": 64}
        engine = tiny.gpu_engine_of(
            config, operations="triton", runtime=_runtime(device), sizes=[1], kv_dtype=kv_dtype, **limits
        )
        driver = Driver(engine)
        driver.run({1: 18}, added=[start(1, [(7 * i) % 311 for i in range(18)], [1, 3])])
        driver.run({1: 1})
        engine.reset(4)
        assert not engine._cache.data.float().any()
        found.append(torch.stack(driver.logits[1]))
    error = (found[0] - found[1]).norm() / found[0].norm()
    assert 0 < error < 0.1
