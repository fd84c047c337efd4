"""Preemption by swap with real processes: memsvc, the executor on a CPU, gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import contextlib
from pathlib import Path
import time

import pytest

from quire.client import AsyncClient
from quire.generation import Usage
from tests.integration.stack import POOL_ID, Stack, running_stack, start_service
from tests.unit.execsvc import tiny

PROMPTS = [f"{number}. The lighthouse keeper wrote in his diary:" for number in range(12)]
MAX_TOKENS = 120
# 64 blocks for a demand of 12 x 11.
EXECUTOR_FLAGS = ("--kv-cache-tokens", "1024", "--max-model-len", "512", "--swap-space", "16MiB")
MEMSVC_FLAGS = ("--no-admission-forecast",)
GATEWAY_FLAGS = ("--preemption-mode", "swap", "--max-queue-time", "480")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with random weights."""
    return str(tiny.write_directory(tmp_path_factory.mktemp("model")))


@contextlib.contextmanager
def swapping_stack(directory: Path, model: str, *gateway: str) -> Iterator[Stack]:
    """Yields a stack that preempts by swap, in a pool that is too small."""
    flags = {"memsvc": MEMSVC_FLAGS, "execsvc": EXECUTOR_FLAGS, "gateway": (*GATEWAY_FLAGS, *gateway)}
    with running_stack(directory, model=model, **flags) as stack:
        yield stack


async def answers(address: str, prompts: list[str], *, together: bool) -> list[tuple[str, Usage]]:
    """Returns what prompts are answered, at once or one after the other."""
    async with AsyncClient(address, timeout=240) as client:

        async def one(prompt: str) -> tuple[str, Usage]:
            result = await client.generate(
                prompt, max_tokens=MAX_TOKENS, ignore_eos=True, seed=7, temperature=1.0, top_p=0.9
            )
            return result.completions[0].text, result.usage

        if together:
            return list(await asyncio.gather(*map(one, prompts)))
        return [await one(prompt) for prompt in prompts]


def texts(results: list[tuple[str, Usage]]) -> list[str]:
    """Returns the texts alone."""
    return [text for text, _ in results]


async def test_who_was_in_host_memory_says_what_it_says_alone_and_computes_nothing_twice(
    tmp_path: Path, model: str
) -> None:
    """Every byte of the cache that was moved must be where the executor reads it, whatever its layout."""
    with swapping_stack(tmp_path, model) as stack:
        together = await answers(stack.address, PROMPTS, together=True)
        pool = stack.wait_idle()
        alone = await answers(stack.address, PROMPTS, together=False)
        assert texts(together) == texts(alone)
        usages = [usage for _, usage in together]
        # Who gives way before anything of it is computed has nothing to be moved.
        swaps, preemptions = (sum(getattr(one, f"{kind}_count") for one in usages) for kind in ("swap", "preemption"))
        assert 0 < swaps <= preemptions
        assert sum(usage.recomputed_token_count for usage in usages) == 0
        # Who ends with the token that was under way when it gave way has ended, to memsvc, and does not come back.
        assert pool.swap_count <= swaps
        assert pool.swap_count <= pool.preemption_count <= preemptions
        (measured,) = stack.execsvc.events("swap_measured")
        assert min(int(str(measured[f"{way}_bytes_per_second"])) for way in ("out", "in")) > 0
        stack.wait_idle()


async def test_a_killed_executor_takes_its_slots_along_and_no_token(tmp_path: Path, model: str) -> None:
    """What was in host memory is computed again on the next one: a pause, the same text, and nothing held."""
    with swapping_stack(tmp_path, model) as stack:
        expected = texts(await answers(stack.address, PROMPTS, together=False))
        with stack.admin():
            interrupted = asyncio.create_task(answers(stack.address, PROMPTS, together=True))
            deadline = time.monotonic() + 60
            while not (await asyncio.to_thread(stack.pool)).swap_count:
                assert not interrupted.done()
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)
        stack.execsvc.process.kill()
        await asyncio.to_thread(stack.execsvc.process.wait)
        flags = ("--model", model, "--memsvc", stack.memsvc.address, "--executor-id", POOL_ID, *EXECUTOR_FLAGS)
        port = stack.execsvc.address.rpartition(":")[2]
        stack.execsvc = start_service("execsvc", tmp_path, *flags, port=port)
        try:
            assert texts(await interrupted) == expected
            await asyncio.to_thread(stack.wait_idle)
        finally:
            stack.execsvc.stop()


async def test_gateways_share_the_host_memory_of_an_executor(tmp_path: Path, model: str) -> None:
    """They number their slots alike and know nothing of each other: neither may get the other's content."""
    with swapping_stack(tmp_path, model) as stack:
        other = start_service("gateway", tmp_path, "--memsvc", stack.memsvc.address, *GATEWAY_FLAGS)
        try:
            other.wait_listening()
            other.wait_serving()
            expected = texts(await answers(stack.address, PROMPTS, together=False))
            used = [0, 0]
            for _ in range(4):
                results = await asyncio.gather(
                    answers(stack.address, PROMPTS, together=True), answers(other.address, PROMPTS[::-1], together=True)
                )
                assert texts(results[0]) == expected == texts(results[1])[::-1]
                used = [used[n] + sum(usage.swap_count for _, usage in part) for n, part in enumerate(results)]
                if all(used):
                    break
            assert all(used), "one of the gateways had never to preempt"
            stack.wait_idle()
        finally:
            other.stop()
