"""What the recent traffic would have found in pools of other sizes, told from the command log."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import InvalidRequestError, PoolNotFoundError, UnsupportedError
from tests.conformance.conftest import OpenRig
from tests.conformance.memory_connections import POOL_ID, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig, test_config


async def simulate(rig: Rig, *block_counts: int, block_size: int = 0) -> tuple[Any, list[int]]:
    """Returns an answer, and the tokens that pools of the sizes given would have found; nothing may change by that."""
    before = rig.state()
    request = admin_pb2.SimulateRequest(pool_id=POOL_ID, block_counts=block_counts, block_size=block_size)
    answer = await rig.admin.Simulate(request)
    assert rig.state() == before
    rig.check()
    assert answer.sampled_share == 1
    return answer, [size.hit_token_count for size in answer.sizes]


async def test_the_pool_itself_finds_what_it_found_and_others_what_they_would_have(rig: Rig) -> None:
    """Otherwise an operator who doubles the memory is surprised by what comes of it."""
    system = prompt(48)
    for _ in range(2):
        for seed in range(1, 13):
            await rig.run([*system, *prompt(65, seed)])
    # Twelve times four blocks and three shared ones go round: 32 find the system prompt alone, 51 find all.
    answer, found = await simulate(rig, 2, 32, 50, 51, 64)
    assert (answer.request_count, answer.query_token_count, answer.block_size) == (24, 24 * 113, 16)
    assert answer.hit_token_count == 23 * 48
    assert found == [23 * 32, 23 * 48, 23 * 48 + 12 * 48, 23 * 48 + 12 * 64, 23 * 48 + 12 * 64]
    assert answer.endless_hit_token_count == found[-1]
    assert answer.HasField("log_age")
    _, larger = await simulate(rig, 100, block_size=64)
    assert larger == [12 * 64]
    default, _ = await simulate(rig)
    assert [size.block_count for size in default.sizes] == [4, 8, 16, 32, 64, 128, 256]


async def test_completions_are_found_by_the_next_turn_and_private_prompts_by_nobody(rig: Rig) -> None:
    """Otherwise conversations, which gain most, seem to gain nothing."""
    turn = await rig.admit(prompt(20))
    await turn.write()
    await turn.extend(prompt(30, 1))
    await turn.close()
    await rig.run([*turn.tokens, *prompt(10, 2)])
    await rig.run(prompt(40, 3))
    for _ in range(2):
        await rig.run(prompt(40, 4), skip_cache_write=True)
    answer, found = await simulate(rig, 30)
    assert (answer.request_count, answer.query_token_count) == (3, 20 + 60 + 40)
    assert found == [48]
    await rig.admin.ResetCache(admin_pb2.ResetCacheRequest(pool_id=POOL_ID))
    await rig.run([*turn.tokens, *prompt(10, 2)])
    assert (await simulate(rig, 30))[1] == [48]
    await rig.run([*turn.tokens, *prompt(10, 2)], tenant="another")
    await rig.run([*turn.tokens, *prompt(10, 2)], cache_salt="salt")
    assert (await simulate(rig, 30))[1] == [48]


async def test_random_traffic_is_told_as_the_pool_served_it(rig: Rig) -> None:
    """Otherwise the model is right about the examples alone."""
    source = random.Random(4)
    for _ in range(60):
        pieces = source.choices(range(6), k=source.randint(1, 4))
        await rig.run([token for piece in pieces for token in prompt(32, piece)] + [7])
    answer, found = await simulate(rig, 32)
    assert 0 < answer.hit_token_count < answer.query_token_count
    assert abs(found[0] - answer.hit_token_count) <= 0.03 * answer.query_token_count


async def test_what_cannot_be_simulated_is_refused(rig: Rig, open_rig: OpenRig) -> None:
    """Otherwise a typing error, or a pool to which the model does not apply, gets a confident answer."""
    for fields, message in (
        ({"block_size": 17}, "block_size: found 17, allowed are 16, 32 and 64"),
        ({"block_counts": [4, 0]}, "block_counts: found 0"),
        ({"block_counts": [1] * 65}, "block_counts: 65 sizes, allowed are at most 64"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            await rig.admin.Simulate(admin_pb2.SimulateRequest(pool_id=POOL_ID, **fields))
    with pytest.raises(PoolNotFoundError):
        await rig.admin.Simulate(admin_pb2.SimulateRequest(pool_id="x"))
    async with open_rig(dataclasses.replace(spec(), sliding_window=40)) as windowed:
        with pytest.raises(UnsupportedError, match="keeps the windows of its sequences"):
            await windowed.admin.Simulate(admin_pb2.SimulateRequest(pool_id=POOL_ID))
    async with grpc_rig(spec(), test_config(command_log_mib=0)) as silent:
        with pytest.raises(UnsupportedError, match="no command log is kept"):
            await silent.admin.Simulate(admin_pb2.SimulateRequest(pool_id=POOL_ID))
