"""Any process may die: no stream ends with a wrong token, and no block leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
import time

import pytest

from execsvc.device_failure import EXIT_DEVICE
from quire.client import AsyncClient, Client
from quire.errors import QuireError
from tests.integration.stack import POOL_ID, Service, Stack, running_stack, start_service
from tests.unit.execsvc import tiny

PROMPTS = [f"{number}. The lighthouse keeper wrote in his diary:" for number in range(4)]
MAX_TOKENS = 80
EXECUTOR_FLAGS = ("--kv-cache-tokens", "4096", "--max-model-len", "1024")


@pytest.fixture
def mortal_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack of its own for each test, since the tests kill parts of it."""
    with running_stack(tmp_path, execsvc=EXECUTOR_FLAGS) as stack:
        yield stack


async def _answers(client: AsyncClient) -> list[str]:
    """Returns the greedy answers to all prompts, streamed at the same time."""

    async def one(prompt: str) -> str:
        result = await client.generate(prompt, max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
        return result.completions[0].text

    return list(await asyncio.gather(*map(one, PROMPTS)))


def _restart(service: Service, directory: Path, *flags: str) -> Service:
    """Kills a service and starts it again on the same port."""
    service.process.kill()
    service.process.wait()
    again = start_service(service.name, directory, *flags, port=service.address.rpartition(":")[2])
    again.wait_listening()
    return again


async def _tokens_are_flowing(stack: Stack) -> None:
    """Waits until the pool holds sequences that have tokens."""
    deadline = time.monotonic() + 20
    while True:
        pool = await asyncio.to_thread(stack.pool)
        if pool.sequence_count == len(PROMPTS) and pool.used_token_count > 25 * len(PROMPTS):
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_an_executor_killed_mid_stream_is_a_pause(mortal_stack: Stack, tmp_path: Path) -> None:
    """When the executor dies and comes back, clients see a pause: no error, no wrong and no repeated token."""
    async with AsyncClient(mortal_stack.address, timeout=180) as client:
        expected = await _answers(client)
        interrupted = asyncio.create_task(_answers(client))
        await _tokens_are_flowing(mortal_stack)
        flags = ("--model", "smollm2", "--memsvc", mortal_stack.memsvc.address, "--executor-id", POOL_ID)
        mortal_stack.execsvc = await asyncio.to_thread(
            _restart, mortal_stack.execsvc, tmp_path, *flags, *EXECUTOR_FLAGS
        )
        try:
            assert await interrupted == expected
            await asyncio.to_thread(mortal_stack.wait_idle)
        finally:
            mortal_stack.execsvc.stop()


async def test_an_executor_whose_device_fails_is_a_pause(tmp_path: Path) -> None:
    """A CUDA error ends one incarnation, in one clear line; its clients see a pause, and nothing else dies."""
    model = str(tiny.write_directory(tmp_path / "tiny"))
    failing = {"program": Path(__file__).with_name("failing_execsvc.py"), "settings": {"FAILING_STEP": "60"}}
    with running_stack(tmp_path, model=model, execsvc=EXECUTOR_FLAGS, failing=failing) as stack:
        async with AsyncClient(stack.address, timeout=60) as client:
            interrupted = asyncio.create_task(_answers(client))
            assert await asyncio.to_thread(stack.execsvc.process.wait, 150) == EXIT_DEVICE
            (event,) = stack.execsvc.events("device_failed")
            assert event["error"] == "CUDA error: an illegal memory access was encountered"
            assert event["kind"] == "device_error"
            last = stack.execsvc.log_path.read_text().splitlines()[-1]
            assert last == f"quire execsvc: the device failed: {event['error']}"
            assert not interrupted.done()
            flags = ("--model", model, "--memsvc", stack.memsvc.address, "--executor-id", POOL_ID, *EXECUTOR_FLAGS)
            stack.execsvc = await asyncio.to_thread(_restart, stack.execsvc, tmp_path, *flags)
            try:
                assert await interrupted == await _answers(client)
                await asyncio.to_thread(stack.wait_idle)
            finally:
                stack.execsvc.stop()


async def test_a_memsvc_killed_mid_stream_is_a_pause(mortal_stack: Stack, tmp_path: Path) -> None:
    """When memsvc dies and comes back empty, nothing is handed out twice and every answer is right."""
    async with AsyncClient(mortal_stack.address, timeout=180) as client:
        expected = await _answers(client)
        interrupted = asyncio.create_task(_answers(client))
        await _tokens_are_flowing(mortal_stack)
        epoch = mortal_stack.pool().epoch
        mortal_stack.memsvc = await asyncio.to_thread(_restart, mortal_stack.memsvc, tmp_path)
        try:
            assert await interrupted == expected
            pool = await asyncio.to_thread(mortal_stack.wait_idle)
            assert pool.epoch > epoch
        finally:
            mortal_stack.memsvc.stop()


async def test_a_gateway_killed_mid_stream_leaves_no_block(mortal_stack: Stack, tmp_path: Path) -> None:
    """When a gateway dies, its blocks come back after the lease TTL, and what it committed stays cached."""
    async with AsyncClient(mortal_stack.address, timeout=60) as client:
        doomed = asyncio.create_task(_answers(client))
        await _tokens_are_flowing(mortal_stack)
        mortal_stack.gateway.process.kill()
        with pytest.raises(QuireError):
            await doomed
    pool = await asyncio.to_thread(mortal_stack.wait_idle, 10.0)
    assert pool.cached_block_count > 0
    again = start_service("gateway", tmp_path, "--memsvc", mortal_stack.memsvc.address)
    try:
        again.wait_listening()
        again.wait_serving()
        with Client(again.address) as sync_client:
            assert sync_client.generate(PROMPTS[0], max_tokens=4, temperature=0.0).usage.completion_token_count == 4
    finally:
        again.stop()


def test_a_drained_gateway_finishes_what_runs(mortal_stack: Stack) -> None:
    """SIGTERM must let running answers finish, refuse new ones, and end with exit code 0."""
    with Client(mortal_stack.address, timeout=60) as client:
        stream = client.stream(PROMPTS[0], max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
        next(iter(stream))
        mortal_stack.gateway.process.terminate()
        assert stream.result().usage.completion_token_count == MAX_TOKENS
    assert mortal_stack.gateway.process.wait(20) == 0
    mortal_stack.wait_idle()
