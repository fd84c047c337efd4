"""What changes logits before a token is chosen, and what is reported of them."""

from __future__ import annotations

import math

import pytest
import torch

from execsvc.choosing import LogprobRows, change_logits
from execsvc.sampler import SamplingSpec, sample
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import InvalidRequestError
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import Driver, start

PROMPT = [(7 * index) % 311 for index in range(40)]


def changed(spec: SamplingSpec, logits: list[float], tokens: list[int]) -> list[float]:
    """Returns the logits after a spec's changes."""
    row = torch.tensor(logits)
    change_logits(row, spec, torch.tensor(tokens, dtype=torch.int64).numpy(), len(tokens))
    return row.tolist()


def test_repetition_counts_the_prompt_and_presence_and_frequency_only_what_was_generated() -> None:
    """Otherwise a model is kept from naming what it was asked about, or not kept from repeating itself."""
    tokens = [0, 1, 2, 2, 3]
    spec = SamplingSpec(repetition_penalty=2.0, prompt_token_count=2)
    assert changed(spec, [2.0, -2.0, 1.0, 0.0, 5.0], tokens) == [1.0, -4.0, 0.5, 0.0, 5.0]
    spec = SamplingSpec(frequency_penalty=0.5, prompt_token_count=2)
    assert changed(spec, [2.0, 2.0, 2.0, 2.0, 2.0], tokens) == [2.0, 2.0, 1.0, 1.5, 2.0]
    spec = SamplingSpec(presence_penalty=0.5, prompt_token_count=2)
    assert changed(spec, [2.0, 2.0, 2.0, 2.0, 2.0], tokens) == [2.0, 2.0, 1.5, 1.5, 2.0]


def test_bias_comes_before_penalties() -> None:
    """Otherwise the same request gives another text than where users come from."""
    spec = SamplingSpec(bias=((0, 3.0), (1, -100.0)), repetition_penalty=2.0)
    assert changed(spec, [1.0, 1.0, 1.0], [0, 2]) == [2.0, -99.0, 0.5]


def test_typical_sampling_drops_what_is_no_surprise_and_what_is_too_much_of_one() -> None:
    """It must keep the tokens whose surprise is nearest to the entropy, as many as reach the mass."""
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]))
    spec = SamplingSpec(temperature=1.0, typical_p=0.3)
    drawn = set(sample(logits.expand(200, -1), [spec] * 200, list(range(200))))
    # The entropy is 1.33 nats: 0.2 (1.61) and 0.15 (1.90) are nearer to it than 0.5 (0.69).
    assert drawn == {1, 2}
    spec = SamplingSpec(temperature=1.0, typical_p=1e-6)
    assert set(sample(logits.expand(50, -1), [spec] * 50, list(range(50)))) == {1}


def test_log_probabilities_are_those_of_the_model_with_their_rank() -> None:
    """Otherwise evaluations that compare models by likelihood are wrong."""
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    rows = LogprobRows()
    rows.add(5, 9, logits, 2, 2)
    exact = torch.log_softmax(logits.double(), -1)
    assert (rows.tables, rows.positions, rows.ranks, rows.counts) == ([5], [9], [2], [3])
    assert rows.token_ids == [2, 1, 2]
    assert rows.values == pytest.approx([float(exact[2]), float(exact[1]), float(exact[2])])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("frequency_penalty", 2.5),
        ("presence_penalty", math.nan),
        ("typical_p", 1.5),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    """A bad value must not sample something else silently."""
    with pytest.raises(InvalidRequestError, match=field):
        SamplingSpec(temperature=1.0, **{field: value})  # type: ignore[arg-type]


def _rows(result: pb.StepResult) -> dict[int, tuple[int, list[int], list[float]]]:
    """Returns rank, tokens and values by position."""
    message = result.logprobs
    tokens, values = columns.unpack_list(message.token_ids, ""), columns.unpack_floats(message.values, "")
    found, first = {}, 0
    for position, rank, count in zip(
        columns.unpack_list(message.positions, ""),
        columns.unpack_list(message.ranks, ""),
        columns.unpack_list(message.counts, ""),
        strict=True,
    ):
        found[position] = (rank, tokens[first : first + count], values[first : first + count])
        first += count
    return found


@pytest.mark.parametrize("device", ["host", "device"])
def test_a_prompt_s_log_probabilities_do_not_depend_on_how_it_is_cut(device: str) -> None:
    """A long prompt is computed in chunks: every position is reported once, and none is off by one."""
    make = tiny.engine_of if device == "host" else tiny.gpu_engine_of
    whole, cut = Driver(make(blocks=64)), Driver(make(blocks=64))
    started = start(1, PROMPT, [1, 2, 3], logprobs=0, prompt_logprobs=1, prompt_token_count=40)
    one = _rows(whole.run({1: 40}, added=[started]))
    parts: dict[int, tuple[int, list[int], list[float]]] = {}
    for index, count in enumerate((7, 16, 16, 1)):
        part = _rows(cut.run({1: count}, added=[started] if index == 0 else []))
        assert not parts.keys() & part.keys()
        parts |= part
    assert list(one) == [40, *range(1, 40)]
    assert one.keys() == parts.keys()
    for position, (rank, tokens, values) in one.items():
        expected = PROMPT[position] if position < 40 else whole.tokens[1][0]
        assert tokens[0] == expected
        assert parts[position][:2] == (rank, tokens)
        assert values == pytest.approx(parts[position][2], abs=1e-4)
        assert position == 40 or (rank == 1) == (tokens[0] == tokens[1])


@pytest.mark.parametrize("device", ["host", "device"])
def test_a_sequence_that_comes_back_is_penalised_for_what_it_said_before(device: str) -> None:
    """Otherwise a preempted sequence goes on with other words than it would have."""
    make = tiny.engine_of if device == "host" else tiny.gpu_engine_of
    params = {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "prompt_token_count": 40}
    driver = Driver(make(blocks=64))
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3, 4], **params)])
    for _ in range(14):
        driver.run({1: 1})
    again = Driver(make(blocks=64))
    known = PROMPT + driver.tokens[1][:6]
    again.run({2: 46}, added=[start(2, known, [9, 8, 7, 6], **params)])
    for _ in range(8):
        again.run({2: 1})
    assert again.tokens[2] == driver.tokens[1][6:15]
    plain = Driver(make(blocks=64))
    plain.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3, 4])])
    for _ in range(14):
        plain.run({1: 1})
    assert plain.tokens[1] != driver.tokens[1], "the penalties were meant to change something"
