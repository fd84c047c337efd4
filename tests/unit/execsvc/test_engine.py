"""The engine does what a plan says, and a bad plan hurts nobody else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from execsvc.engine import Engine
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import InvalidRequestError, StaleEpochError
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import Driver, start

PROMPT = [(7 * index) % 311 for index in range(40)]


@pytest.fixture
def driver() -> Driver:
    """A driver of a fresh engine with 64 blocks."""
    return Driver(tiny.engine_of(blocks=64, max_num_seqs=4, max_num_batched_tokens=256))


def reasons(result: pb.StepResult) -> dict[int, str]:
    """Returns the failed tables and why."""
    return {error.table: error.reason for error in result.errors}


def test_a_prompt_yields_a_token_only_when_all_of_it_is_computed(driver: Driver) -> None:
    """Otherwise chunked prefill would stream garbage."""
    first = driver.run({7: 39}, added=[start(7, PROMPT, [1, 2, 3])])
    assert columns.unpack_list(first.written_counts, "") == [39]
    assert not first.sampled_tables
    second = driver.run({7: 1})
    assert columns.unpack_list(second.sampled_tables, "") == [7]
    assert columns.unpack_list(second.written_counts, "") == [40]


def test_decode_goes_on_from_the_engine_s_own_token(driver: Driver) -> None:
    """Otherwise a gateway would have to wait for each token before it could plan the next step."""
    driver.run({7: 40}, added=[start(7, PROMPT, [1, 2, 3])])
    driver.run({7: 1})
    driver.run({7: 1})
    again = Driver(tiny.engine_of(blocks=64))
    again.run({1: 42}, added=[start(1, PROMPT + driver.tokens[7][:2], [9, 8, 7])])
    assert again.tokens[1] == driver.tokens[7][2:]
    assert torch.equal(again.logits[1][0], driver.logits[7][2])


def test_siblings_draw_their_first_token_as_they_would_alone(driver: Driver) -> None:
    """Otherwise a further sample of a request gives another text than the same seed in a request of its own."""
    parent = start(1, PROMPT, [1, 2, 3], temperature=1.0, seed=5, sibling_seeds=[6, 7, 2**64 - 1])
    assert not driver.run({1: 39}, added=[parent]).sibling_tables
    first = driver.run({1: 1})
    assert columns.unpack_list(first.sibling_tables, "") == [1, 1, 1]
    alone = Driver(tiny.engine_of(blocks=64))
    for table, seed in enumerate((5, 6, 7, 2**64 - 1), 1):
        alone.run({table: 40}, added=[start(table, PROMPT, [1, 2, 3], temperature=1.0, seed=seed)])
    drawn = [*driver.tokens[1], *columns.unpack_list(first.sibling_tokens, "")]
    assert drawn == [alone.tokens[table][0] for table in (1, 2, 3, 4)]
    assert len(set(drawn)) > 1
    assert not driver.run({1: 1}).sibling_tables, "they are drawn once"


def test_growth_and_copies_come_before_the_computation(driver: Driver) -> None:
    """Otherwise a sequence would write into a block that it shares, or into none."""
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    # A fork at token 40: two blocks are shared, the third is copied.
    fork = start(2, [*PROMPT, driver.tokens[1][0]], [1, 2, 9], computed=40)
    result = driver.run({1: 1, 2: 1}, added=[fork], copies=[3, 9])
    assert not result.errors
    assert torch.equal(driver.logits[1][1], driver.logits[2][0])
    for _ in range(7):
        driver.run({1: 1})
    result = driver.run({1: 1}, appended=[1, 3, 12])
    assert columns.unpack_list(result.written_counts, "") == [49]


def test_an_entry_may_come_to_name_another_block_with_the_same_content(driver: Driver) -> None:
    """Otherwise tables cannot follow when equal blocks become one."""
    driver.run({1: 40, 2: 40}, added=[start(1, PROMPT, [1, 2, 3]), start(2, PROMPT, [11, 12, 13])])
    driver.engine._cache.data[[11, 12]] = float("nan")
    result = driver.run({1: 1, 2: 1}, appended=[2, 0, 1, 2, 1, 2])
    assert not result.errors
    assert torch.equal(driver.logits[1][1], driver.logits[2][1])
    driver.run({2: 1})
    driver.run({1: 1})
    assert driver.tokens[1] == driver.tokens[2]


def test_removed_tables_are_acknowledged_even_twice(driver: Driver) -> None:
    """Otherwise a repeated plan would leave memsvc waiting for a fence for ever."""
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    for _ in range(2):
        assert columns.unpack_list(driver.run(removed=[1]).fenced, "") == [1]
    assert driver.engine.open_tables == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (start(1, PROMPT, [1, 2, 0]), "INVALID_REQUEST"),
        (start(1, PROMPT, [1, 2, 64]), "INVALID_REQUEST"),
        (start(1, [], [1]), "INVALID_REQUEST"),
        (start(1, [320], [1]), "INVALID_REQUEST"),
        (start(1, [1] * 2000, list(range(1, 60))), "INVALID_REQUEST"),
        (start(1, PROMPT, [1, 2, 3], computed=40), "INVALID_REQUEST"),
        (start(1, PROMPT, [1], computed=17), "INVALID_REQUEST"),
        (start(1, PROMPT, [1, 2, 3], temperature=-1.0), "INVALID_REQUEST"),
        (start(1, PROMPT, [1, 2, 3], withheld_tokens=columns.pack([7, 320]), withheld_until=50), "INVALID_REQUEST"),
        (start(1, PROMPT, [1, 2, 3], temperature=float("nan")), "INVALID_REQUEST"),
        (start(1, PROMPT, [1, 2, 3], temperature=1.0, top_p=0.0), "INVALID_REQUEST"),
        (start(2, PROMPT, [1, 2, 3]), "SEQUENCE_EXISTS"),
        (start(1, PROMPT, [1, 2]), "INVALID_REQUEST"),
    ],
)
def test_a_bad_sequence_fails_alone(driver: Driver, bad: pb.SequenceStart, reason: str) -> None:
    """Otherwise one broken request would take down the batch that it is in."""
    driver.run({2: 5, 3: 5}, added=[start(2, PROMPT[:5], [10]), start(3, PROMPT[:5], [11])])
    scheduled = {3: 1} if bad.table == 2 else {bad.table: 40, 3: 1}
    result = driver.run(scheduled, added=[bad])
    assert reasons(result) == {bad.table: reason}
    assert columns.unpack_list(result.sampled_tables, "") == [3]
    assert bad.table not in driver.engine.open_tables


def test_bad_growth_and_schedules_fail_alone(driver: Driver) -> None:
    """Otherwise keys would be written outside of the sequence's blocks."""
    for table in (1, 2, 3):
        driver.run({table: 16}, added=[start(table, PROMPT[:16], [table])])
    result = driver.run({1: 1, 2: 2, 9: 1}, appended=[1, 2, 5, 8, 0, 5])
    assert reasons(result) == {1: "INVALID_REQUEST", 2: "INVALID_REQUEST", 9: "SEQUENCE_NOT_FOUND"}
    result = driver.run({3: 1}, appended=[3, 1, 64])
    assert reasons(result) == {3: "INVALID_REQUEST"}
    assert driver.engine.open_tables == []


def test_a_sequence_too_many_is_refused(driver: Driver) -> None:
    """Otherwise a gateway's mistake would grow the executor's memory without limit."""
    result = driver.run(added=[start(table, PROMPT, [1, 2, 3]) for table in range(1, 6)])
    assert list(reasons(result)) == [5]


def test_logits_that_are_not_finite_fail_their_sequence_only(driver: Driver) -> None:
    """Otherwise a NaN would be streamed as a token, or would stop everybody."""
    driver.run({1: 16, 2: 16}, added=[start(1, PROMPT[:16], [1, 3]), start(2, PROMPT[:16], [2, 4])])
    driver.engine._cache.data[1].fill_(float("nan"))
    result = driver.run({1: 1, 2: 1})
    assert reasons(result) == {1: "LOGITS_NOT_FINITE"}
    assert columns.unpack_list(result.sampled_tables, "") == [2]
    assert columns.unpack_list(result.written_tables, "") == [2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheduled_counts", columns.pack([1, 1])),
        ("scheduled_counts", columns.pack([0])),
        ("scheduled_counts", columns.pack([257])),
        ("appended", columns.pack([1, 2])),
        ("removed", b"abc"),
        ("copies", columns.pack([1])),
        ("copies", columns.pack([0, 5])),
        ("copies", columns.pack([1, 64])),
        ("copies", columns.pack([1, 5, 2, 5])),
        ("copies", columns.pack([1, 5, 5, 6])),
    ],
)
def test_a_malformed_plan_changes_nothing(driver: Driver, field: str, value: bytes) -> None:
    """Otherwise half a plan would be applied, and the gateway's picture would be wrong."""
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    before = driver.engine._cache.data.clone()
    plan = pb.StepPlan(step=2, epoch=1, scheduled_tables=columns.pack([1]), scheduled_counts=columns.pack([1]))
    plan.added.append(start(2, PROMPT, [4, 5, 6]))
    setattr(plan, field, value)
    with pytest.raises(InvalidRequestError, match=field):
        driver.engine.apply(plan)
    assert driver.engine.open_tables == [1]
    assert torch.equal(driver.engine._cache.data, before)
    assert not driver.run({1: 1}).errors


def test_tables_belong_to_the_stream_that_added_them(driver: Driver) -> None:
    """Otherwise one gateway could stop or read another's sequences."""
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])], owner=1)
    result = driver.run({1: 1}, owner=2, removed=[1], appended=[1, 0, 9])
    assert reasons(result) == {1: "SEQUENCE_NOT_FOUND"}
    assert not driver.run({1: 1}, owner=1).errors
    driver.engine.drop_owner(1)
    assert driver.engine.open_tables == []


def test_a_new_epoch_voids_every_table_and_older_plans(driver: Driver) -> None:
    """Otherwise a gateway that missed a restart of memsvc would write into blocks of others."""
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    driver.engine.begin_epoch(5)
    driver.engine.begin_epoch(3)
    assert driver.engine.epoch == 5
    assert driver.engine.open_tables == []
    with pytest.raises(StaleEpochError, match="epoch 1"):
        driver.run({1: 1})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.6), (torch.float16, 0.08)])
def test_half_precision_works(dtype: torch.dtype, tolerance: float) -> None:
    """Otherwise --dtype would be a flag that nobody has tried."""
    driver = Driver(tiny.engine_of(dtype=dtype))
    driver.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    driver.run({1: 1})
    exact = Driver(tiny.engine_of())
    exact.run({1: 40}, added=[start(1, PROMPT, [1, 2, 3])])
    assert (driver.logits[1][0].float() - exact.logits[1][0]).abs().max() < tolerance


def test_a_sliding_window_is_honoured() -> None:
    """Otherwise a Mistral would see more than it was trained to."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=1, sliding_window=16)
    engines: list[Engine] = [tiny.engine_of(config), tiny.engine_of(config)]
    logits = []
    for engine, first in zip(engines, (3, 250), strict=True):
        driver = Driver(engine)
        driver.run({1: 40}, added=[start(1, [first, *PROMPT[1:]], [1, 2, 3])])
        logits.append(driver.logits[1][0])
    assert torch.equal(*logits), "the last of 40 tokens cannot see the first through one layer and a window of 16"


WINDOWED = dataclasses.replace(tiny.CONFIG, sliding_window=24)


def test_blocks_that_left_the_window_may_belong_to_somebody_else() -> None:
    """Otherwise a sequence that slides changes its words when memory gives its old blocks away."""
    prompt = [(5 * index) % 311 for index in range(100)]
    drivers = [Driver(tiny.engine_of(WINDOWED, blocks=16)) for _ in range(2)]
    for driver, spoilt in zip(drivers, (False, True), strict=True):
        driver.run({1: 60}, added=[start(1, prompt, [1, 2, 3, 4, 5, 6, 7])])
        if spoilt:
            # With 60 tokens computed the next query reads from 37 on: blocks 1 and 2 are outside.
            driver.engine._cache.data[1:3] = float("nan")
        driver.run({1: 40})
        for _ in range(5):
            driver.run({1: 1})
    assert drivers[0].tokens == drivers[1].tokens
    assert all(torch.equal(*pair) for pair in zip(drivers[0].logits[1], drivers[1].logits[1], strict=True))


def test_a_sequence_may_begin_with_null_entries_outside_its_window() -> None:
    """Otherwise a prompt whose window is cached is computed again from its beginning."""
    prompt = [(5 * index) % 311 for index in range(100)]
    driver = Driver(tiny.engine_of(WINDOWED, blocks=16))
    driver.run({1: 100}, added=[start(1, prompt, [1, 2, 3, 4, 5, 6, 7])])
    driver.run({2: 20}, added=[start(2, prompt, [0, 0, 0, 4, 5, 8, 9], computed=80)])
    assert torch.equal(driver.logits[1][0], driver.logits[2][0])


@pytest.mark.parametrize(
    ("blocks", "wrong"), [([0, 0, 0, 0, 5, 8, 9], 0), ([16, 0, 0, 4, 5, 8, 9], 16), ([0, 0, 0, 4, 5, 0, 9], 0)]
)
def test_a_null_entry_that_would_be_read_or_a_block_beyond_the_pool_is_refused(blocks: list[int], wrong: int) -> None:
    """Otherwise a sequence attends to nothing, or to memory that is not the cache's."""
    driver = Driver(tiny.engine_of(WINDOWED, blocks=16))
    result = driver.run({2: 1}, added=[start(2, PROMPT * 3, blocks, computed=80)])
    assert f"block {wrong} is out of range" in result.errors[0].message


def test_a_null_entry_without_a_window_is_refused(driver: Driver) -> None:
    """Otherwise a table with a hole is attended to as if it were whole."""
    result = driver.run({2: 1}, added=[start(2, PROMPT, [0, 2, 3], computed=39)])
    assert "block 0 is out of range" in result.errors[0].message
