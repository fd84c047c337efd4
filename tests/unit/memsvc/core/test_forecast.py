"""The forecast keeps room for what runs, and no more: too little is computed twice, too much stands empty."""

from __future__ import annotations

import numpy as np
import pytest

from memsvc.core.forecast import RECOMPUTE_SHARE, OutputForecast, RecomputeControl, trajectory
from memsvc.core.memory import MemoryCore
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from quire.columns import pack
from quire.errors import BlockPoolExhaustedError, InvalidRequestError
from quire.memory import Admission, AdmitRequest, CloseReason, JournalEntry, PoolSpec

SIZE = 16


def learned(lengths: list[int]) -> OutputForecast:
    """Returns a life table that has seen sequences of these lengths end."""
    outputs = OutputForecast()
    for length in lengths:
        outputs.observe(0, length, ended=True)
    return outputs


def test_outputs_that_ended_are_expected_to_end_there_again() -> None:
    """A pool of short answers that is run as if they were long holds a fraction of what it could."""
    outputs = learned([20] * 200)
    survival = outputs.survival(np.zeros(4, np.int64))
    assert survival[15] > 0.8
    assert survival[22] < 0.1


def test_those_that_still_run_count_as_having_lived() -> None:
    """To learn from ended ones alone takes the short ones for the rule while the long ones are still running."""
    outputs = learned([20] * 20)
    alone = outputs.survival(np.zeros(0, np.int64))
    beside = outputs.survival(np.full(60, 30, np.int64))
    assert beside[25] > alone[25] + 0.3


def change(tokens: int, least: int, limit: int, horizon: int, outputs: OutputForecast) -> tuple[float, float]:
    """Returns mean and variance of the blocks that one table of 4 blocks takes more in `horizon` steps."""
    column = np.array([tokens], np.int64)
    ages = column - 60
    mean, variance = trajectory(
        outputs.survival(ages),
        ages,
        column,
        np.array([least], np.int64),
        np.array([limit], np.int64),
        np.array([4], np.int64),
        SIZE,
        np.array([horizon], np.int64),
    )
    return float(mean[0]), float(variance[0])


def test_what_a_request_is_sure_to_generate_is_certain() -> None:
    """With ignore_eos nothing is left to chance: a forecast that hopes for an early end preempts for sure."""
    outputs = learned([5] * 300)
    assert change(64, 200, 200, 100, outputs) == (7.0, 0.0)
    hoped, spread = change(64, 64, 200, 100, outputs)
    assert hoped < 0
    assert spread > 0
    assert change(64, 200, 200, 136, outputs) == (-4.0, 0.0)


def test_the_margin_rises_while_too_much_is_computed_twice_and_falls_while_nothing_is() -> None:
    """A margin that is right for a large pool wastes or thrashes a small one."""
    control = RecomputeControl(1000)
    first = control.margin
    for _ in range(40):
        control.count(400, 60)
    assert control.share > 0.1
    assert control.margin > first + 0.5
    high = control.margin
    for _ in range(400):
        control.count(400, 0)
    assert control.margin < high
    assert control.margin >= 0.5
    for _ in range(4000):
        control.count(400, 400)
    assert control.margin == 4.0


class Pool:
    """A core with a forecast, one gateway, and a pool of `usable` blocks."""

    def __init__(self, usable: int) -> None:
        self.core = MemoryCore(bytes(32), lease_ttl=float("inf"), forecast=True)
        spec = PoolSpec(usable + 1, SIZE, 1, "m", "float32", 4096)
        self.core.register_pool(PoolRegistration("pool", 1, "h:1", spec), 1, 0.0)
        self.gateway = self.core.connect_gateway("g", 1, 0.0)
        self.count = 0

    def admit(self, tokens: int, most: int, least: int = 0, **fields: bool | int) -> Admission:
        """Asks for a table of a prompt of so many tokens that shares nothing."""
        self.count += 1
        prompt = pack([self.count * 10_000 + place for place in range(tokens)])
        request = AdmitRequest(
            "pool", 1, f"r{self.count}", 0, prompt, max_new_tokens=most, min_new_tokens=least, **fields
        )
        return self.core.admit(self.gateway, request, 0.0)

    def close(self, admission: Admission, reason: CloseReason) -> None:
        """Closes a table."""
        entry = JournalEntry("pool", 1, closed=[admission.table], close_reasons=[reason])
        self.core.journal(self.gateway, "pool", 1, packed(entry), 0.0)


def test_a_request_waits_if_those_that_run_will_need_its_blocks() -> None:
    """It would be preempted, or preempt others, as soon as they grow."""
    pool = Pool(40)
    for _ in range(4):
        pool.admit(4 * SIZE, 6 * SIZE, 6 * SIZE)
    with pytest.raises(BlockPoolExhaustedError, match=r"\d+ blocks are forecast to be needed \d+ steps ahead"):
        pool.admit(4 * SIZE, 6 * SIZE, 6 * SIZE)
    assert pool.core.pool("pool").memory.pool.available_block_count == 24


def test_a_lone_request_is_never_held_back() -> None:
    """Headroom where nothing runs would keep a pool idle for ever."""
    pool = Pool(8)
    assert len(pool.admit(8 * SIZE, 400, 400).block_ids) == 8


def test_what_is_computed_again_is_counted_at_the_admission() -> None:
    """The margin goes by it: what is not seen is not corrected."""
    pool = Pool(64)
    admission = pool.admit(20 * SIZE, 100)
    pool.close(admission, CloseReason.PREEMPTED)
    control = pool.core.pool("pool").memory.forecast.control
    assert control.share < RECOMPUTE_SHARE
    pool.admit(20 * SIZE, 100, resumed=True)
    assert control.share > RECOMPUTE_SHARE


def test_what_comes_back_from_host_memory_is_not_computed_again() -> None:
    """Otherwise admissions are held back for a price that nobody pays."""
    pool = Pool(64)
    admission = pool.admit(20 * SIZE, 100)
    pool.close(admission, CloseReason.SWAPPED)
    control = pool.core.pool("pool").memory.forecast.control
    pool.admit(20 * SIZE, 100, resumed=True, swapped_token_count=20 * SIZE - 1)
    pool.admit(20 * SIZE, 100)
    assert control.share < RECOMPUTE_SHARE


def test_a_request_cannot_promise_more_than_it_may_have() -> None:
    """A forecast from figures that contradict one another holds everybody back."""
    pool = Pool(8)
    with pytest.raises(InvalidRequestError, match=r"min_new_tokens: found 11, allowed are 0 \.\. 10"):
        pool.admit(SIZE, 10, 11)
