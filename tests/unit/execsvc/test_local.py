"""The executor in the same process, and its start-up."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
import threading

import pytest

from execsvc import server
from execsvc.config import ExecsvcConfig
from execsvc.engine_thread import EngineThread
from execsvc.executor import Executor
from execsvc.loading import load
from execsvc.local import LocalExecutor
from execsvc.warmup import run_step
from kernels.cpu.library import SLOW
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import ConfigError, ExecutorUnavailableError, NotReadyError, StaleEpochError
from quire.hashing import PrefixRoot
from tests.unit.execsvc import tiny
from tests.unit.execsvc.compiled import runnable_variants
from tests.unit.execsvc.tiny import start


async def test_a_gateway_in_the_same_process_needs_no_socket(tmp_path: Path) -> None:
    """Otherwise `quire serve --in-process` would not exist. Plans may be sent before results are there."""
    directory = str(tiny.write_directory(tmp_path))
    executor = LocalExecutor(ExecsvcConfig(model=directory, kv_cache_tokens=2048, num_threads=1))
    try:
        with pytest.raises(NotReadyError):
            await executor.tokenizer()
        await executor.start()
        await executor.begin_epoch(2)
        description = await executor.describe()
        assert description.ready
        assert description.batch_invariant
        request = pb.Open(
            gateway_id="gw", gateway_incarnation=5, executor_incarnation=description.executor_incarnation, epoch=2
        )
        assert (await executor.open(request)).epoch == 2
        prompt = start(1, list(range(20)), [1, 2])
        plans = [
            pb.StepPlan(step=step, epoch=2, scheduled_tables=columns.pack([1]), scheduled_counts=columns.pack([count]))
            for step, count in enumerate([20, 1, 1], start=1)
        ]
        plans[0].added.append(prompt)
        results = await asyncio.gather(*(executor.run(plan) for plan in plans))
        assert all(result.sampled_tokens for result in results)
        await executor.fence(pb.FenceRequest(gateway_incarnations=[5]))
        with pytest.raises(StaleEpochError, match="fenced"):
            await executor.run(pb.StepPlan(step=4, epoch=2))
    finally:
        await executor.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 17}, "block_size: 17"),
        ({"max_model_len": 5000}, "more than the model's 1024"),
        ({"kv_cache_tokens": 100}, "max_model_len to"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"attention_backend": "triton"}, "triton needs a GPU"),
        ({"quantization": "int8", "dtype": "float32"}, "quantization: int8 needs the compiled step"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "fp8_e4m3 needs the Triton kernels on a CUDA device"),
        (
            {"kv_cache_dtype": "int8_per_token_head", "dtype": "float32"},
            "int8_per_token_head needs the compiled step on a CPU; this is cpu .*, where allowed is auto",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    """Otherwise a mistake would show as a crash in the first request."""
    directory = str(tiny.write_directory(tmp_path))
    with pytest.raises(ConfigError, match=message):
        load(ExecsvcConfig(**{"model": directory, "kv_cache_tokens": 2048, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "/nothing/here"], 1, "no such file or directory"),
        (["--block-size", "8"], 2, "--block-size: 8 is out of range"),
        (["--kv-cache-bytes", "lots"], 2, "kv_cache_bytes: not a size in bytes"),
        (["--kv-cache-bytes", "120%"], 2, "kv_cache_bytes: not a share"),
        (["--swap-space", "much"], 2, "swap_space: not a size in bytes"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise operators would read stack traces."""
    # Logging is set up once a process: it would keep this test's stderr for all tests after it.
    monkeypatch.setattr(server, "configure_logging", lambda *_args, **_kwargs: None)
    assert server.main([*arguments, "--port", "0", "--log-format", "json"], {}) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("quire execsvc: ")


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_for_few_sequences_starts(tmp_path: Path, count: int) -> None:
    """What is measured at the start must not take more sequences than there may be."""
    directory = str(tiny.write_directory(tmp_path))
    assert load(ExecsvcConfig(model=directory, kv_cache_tokens=2048, max_num_seqs=count)).batch_invariant


def test_the_measuring_step_runs_whatever_the_sizes() -> None:
    """Otherwise the memory of a GPU could not be measured."""
    for tokens, sequences in ((100, 7), (2000, 3), (5, 5), (1, 1)):
        engine = tiny.engine_of(blocks=60, max_num_batched_tokens=tokens)
        run_step(engine, tokens, sequences, 16)
        assert engine.open_tables == []


class _Half:
    """The first half of a piece of work."""

    deferred = True

    def __init__(self, name: str, seen: list[str], error: BaseException | None = None) -> None:
        self.name, self.seen, self.error = name, seen, error
        self.done = threading.Event()

    def wait(self) -> None:
        """Waits until the test lets it."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        self.seen.append(f"waited {self.name}")


async def test_the_next_step_begins_while_the_device_is_busy_with_the_last() -> None:
    """Otherwise a GPU would idle between two steps. What was begun is finished in order, at the latest at the end."""
    seen: list[str] = []
    halves = [_Half(name, seen) for name in "abc"]
    thread = EngineThread(lambda _: None)

    def begin(half: _Half) -> _Half:
        seen.append(f"began {half.name}")
        return half

    def finish(half: _Half) -> str:
        seen.append(f"finished {half.name}")
        return half.name

    futures = [await thread.submit_halves(functools.partial(begin, half), finish) for half in halves]
    await thread.call(seen.append, "between")
    assert seen == ["began a", "began b", "began c", "between"]
    closing = asyncio.create_task(thread.close())
    for half in halves:
        half.done.set()
    await closing
    assert [await future for future in futures] == ["a", "b", "c"]
    assert [entry for entry in seen if entry.startswith("finished")] == ["finished a", "finished b", "finished c"]


async def test_a_device_that_fails_in_the_middle_of_a_step_is_told_to_the_owner() -> None:
    """Otherwise the process would go on with a device that answers nothing any more, and acknowledge fences on it."""
    defects: list[BaseException] = []
    thread = EngineThread(defects.append)
    broken = _Half("a", [], RuntimeError("CUDA error: an illegal memory access was encountered"))
    broken.done.set()
    future = await thread.submit_halves(lambda: broken, lambda half: half.name)
    with pytest.raises(ExecutorUnavailableError, match="illegal memory access") as caught:
        await future
    assert caught.value.reason == "DEVICE_FAILED"
    assert defects == [broken.error]
    with pytest.raises(ExecutorUnavailableError):
        await thread.call(lambda: "fenced")
    assert defects == [broken.error]
    await thread.close()


def test_the_compiled_step_is_chosen_by_what_the_machine_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler or the instructions a user must get the same model from torch, and be told by Describe."""
    directory = str(tiny.write_directory(tmp_path))
    fast = any(name not in SLOW for name in runnable_variants())
    if fast:
        loaded = load(ExecsvcConfig(model=directory, kv_cache_tokens=2048))
        assert (loaded.dtype, loaded.batch_invariant) == ("bfloat16", True)
        assert loaded.attention_backend.startswith("native (")
    monkeypatch.setenv("QUIRE_CPU_ISA", "off")
    loaded = load(ExecsvcConfig(model=directory, kv_cache_tokens=2048))
    assert (loaded.dtype, loaded.attention_backend) == ("float32", "torch")
    with pytest.raises(ConfigError, match="native cannot be used: QUIRE_CPU_ISA=off"):
        load(ExecsvcConfig(model=directory, kv_cache_tokens=2048, attention_backend="native"))
    monkeypatch.setenv("QUIRE_CPU_ISA", "vax")
    assert load(ExecsvcConfig(model=directory, kv_cache_tokens=2048)).attention_backend == "torch"
    monkeypatch.delenv("QUIRE_CPU_ISA")
    with pytest.raises(ConfigError, match="not in float32"):
        load(ExecsvcConfig(model=directory, kv_cache_tokens=2048, dtype="float32", attention_backend="native"))


@pytest.mark.skipif(not runnable_variants(), reason="the CPU step was not compiled: no C++ compiler")
async def test_a_cache_in_8_bits_holds_twice_the_tokens_and_is_a_pool_of_its_own(tmp_path: Path) -> None:
    """Half the memory would be wasted; or blocks would be looked for, and found, among those of another type."""
    directory = str(tiny.write_directory(tmp_path))
    pools = {}
    for kv_cache_dtype in ("auto", "int8_per_token_head"):
        config = ExecsvcConfig(
            model=directory, kv_cache_bytes="2MiB", attention_backend="native", kv_cache_dtype=kv_cache_dtype
        )
        executor = Executor(config, lambda _: None)
        executor.become_ready(load(config))
        pools[kv_cache_dtype] = executor.pool_spec()
        assert executor.loaded.batch_invariant
        await executor.close()
    wide, narrow = pools.values()
    assert (wide.kv_dtype, narrow.kv_dtype) == ("bfloat16", "int8_per_token_head")
    head_dim = tiny.CONFIG.head_dim
    assert narrow.bytes_per_block * 2 * head_dim == wide.bytes_per_block * (head_dim + 4)
    assert narrow.block_count == (2 << 20) // narrow.bytes_per_block
    roots = {PrefixRoot(spec.model_id, spec.block_size, spec.kv_dtype, "", b"", "").digest() for spec in pools.values()}
    assert len(roots) == 2
    with pytest.raises(ConfigError, match="the compiled step here has int8_per_token_head"):
        load(ExecsvcConfig(model=directory, attention_backend="native", kv_cache_dtype="fp8_e4m3"))
