"""`quire serve`, and `quire memsvc`, `execsvc`, `gateway` for one service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import os
from pathlib import Path
import shutil
import signal
import sys
from typing import Annotated, Final

from rich.text import Text
import typer

from quire.cli.output import console, notices
from quire.cli.progress import TerminalReporter
from quire.client import AsyncClient
from quire.serve import plan
from quire.serve.supervisor import Supervisor

LOG_DIRECTORY: Final = Path(".quire/logs")
STARTUP_TIMEOUT: Final = 300.0
_BANNER_SECONDS: Final = 10.0
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def own_command() -> str:
    """Returns what a user types to run this command again: "quire" if that finds it, else its path."""
    found = Path(sys.argv[0])
    if shutil.which("quire") is not None or not found.is_file():
        return "quire"
    return os.path.relpath(found)


def run_supervised(
    options: plan.ServeOptions,
    *,
    log_directory: Path,
    startup_timeout: float,
    verbose: bool,
    body: Callable[[dict[str, str]], Awaitable[None]],
) -> None:
    """Runs the services for as long as `body(addresses)` runs, or until SIGINT, SIGTERM or SIGHUP.

    Raises:
        QuireError: they cannot be started, or stopped working.
    """
    processes = plan.plan_processes(options)
    addresses = {process.name: process.address for process in processes}

    async def main(reporter: TerminalReporter) -> None:
        async def healthy() -> None:
            reporter.finish()
            await body(addresses)

        supervisor = Supervisor(processes, log_directory, reporter, startup_timeout)
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, supervisor.request_stop)
        await supervisor.run(healthy)

    with TerminalReporter(verbose=verbose) as reporter:
        asyncio.run(main(reporter))


async def _print_banner(addresses: dict[str, str], log_directory: Path) -> None:
    """Says what is served where, and what to type next."""
    command = own_command()
    gateway = addresses["gateway"]
    async with AsyncClient(gateway) as client:
        model = ", ".join(one.name for one in await client.models(timeout=_BANNER_SECONDS))
    port = gateway.rpartition(":")[2]
    where = "" if int(port) == plan.GATEWAY_PORT else f" --address {gateway}"
    printer = console()
    printer.print(Text.assemble("\nQuire serves ", (model, "bold"), " at ", (gateway, "bold green"), "\n"))
    printer.print(f'  {command} generate "The capital of France is" --max-tokens 32{where}', soft_wrap=True)
    printer.print(f"  {command} chat{where}\n", soft_wrap=True)
    memory = f"memory at {addresses['memsvc']}" if "memsvc" in addresses else "all in one process"
    printer.print(Text(f"{memory}; logs in {log_directory}; Ctrl-C drains and stops", "dim"), soft_wrap=True)


def serve(
    *,
    model: Annotated[str, typer.Option(metavar="PATH|smollm2", help="GGUF file, model directory, or smollm2.")],
    host: Annotated[str, typer.Option(help="Where the gateway listens; the others stay on loopback.")] = plan.LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the gateway; 0: any free.")] = plan.GATEWAY_PORT,
    memsvc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of memsvc.")] = plan.MEMSVC_PORT,
    execsvc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the executor.")] = plan.EXECSVC_PORT,
    in_process: Annotated[bool, typer.Option("--in-process", help="All three in one process.")] = False,
    store: Annotated[str | None, typer.Option(help="memory:// or redis://HOST:PORT/DB.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name that requests use.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block: 16, 32 or 64.")] = None,
    kv_cache_bytes: Annotated[str | None, typer.Option(help="Size of the KV cache: 512MiB, or on a CPU 25%.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache in tokens.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="auto, fp8_e4m3 (GPU) or int8_per_token_head (CPU).")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="On a CPU: none, or int8 or int4 weights.")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Part of the GPU's memory to use.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="Sampling where a request does not say: auto, vllm (none), or a directory.")
    ] = None,
    override_generation_config: Annotated[
        str | None, typer.Option(help="What goes before it, as JSON.", metavar="JSON")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences that run at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens that a step computes.")] = None,
    attention_backend: Annotated[str | None, typer.Option(help="auto, torch or triton.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Threads that compute on the CPU.")] = None,
    max_queue_size: Annotated[int | None, typer.Option(help="Most requests that wait.")] = None,
    max_queue_time: Annotated[float | None, typer.Option(help="Seconds that a request may wait.")] = None,
    scheduling_policy: Annotated[str | None, typer.Option(help="Who goes first: fcfs or priority.")] = None,
    long_prefill_token_threshold: Annotated[
        int | None, typer.Option(help="Most tokens of one prompt in a step that others take part in.")
    ] = None,
    enable_prefix_caching: Annotated[bool | None, typer.Option(help="Reuse KV of equal prefixes.")] = None,
    api_server_count: Annotated[int | None, typer.Option(help="Processes of the gateway that serve clients.")] = None,
    log_dir: Annotated[Path, typer.Option(help="Where the services log.")] = LOG_DIRECTORY,
    log_level: Annotated[str, typer.Option(help="Least level that is logged.")] = "info",
    startup_timeout: Annotated[float, typer.Option(min=1, help="Seconds until all must serve.")] = STARTUP_TIMEOUT,
    drain_grace: Annotated[float, typer.Option(min=0, help="Seconds that running requests get at the end.")] = 25.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show all that is logged, not only warnings.")
    ] = False,
) -> None:
    """Serve a model: start memsvc, execsvc and gateway, watch over them, and drain them at Ctrl-C.

    Options that are not given are the services' own defaults, and can be set as QUIRE_<SERVICE>_<NAME>. A service that
    dies is started again, at most five times a minute.

    For example:

        quire serve --model smollm2

        quire serve --model ./Qwen3-0.6B --port 6000 --kv-cache-bytes 2GiB --max-model-len 8192

        quire serve --model smollm2 --in-process --port 0
    """
    passed = {
        "store": store,
        "served_model_name": served_model_name,
        "device": device,
        "dtype": dtype,
        "block_size": block_size,
        "kv_cache_bytes": kv_cache_bytes,
        "kv_cache_tokens": kv_cache_tokens,
        "kv_cache_dtype": kv_cache_dtype,
        "quantization": quantization,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": max_model_len,
        "generation_config": generation_config,
        "override_generation_config": override_generation_config,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "attention_backend": attention_backend,
        "num_threads": num_threads,
        "max_queue_size": max_queue_size,
        "api_server_count": api_server_count,
        "max_queue_time": max_queue_time,
        "scheduling_policy": scheduling_policy,
        "long_prefill_token_threshold": long_prefill_token_threshold,
        "enable_prefix_caching": None if enable_prefix_caching is None else str(enable_prefix_caching).lower(),
    }
    options = plan.ServeOptions(
        model=model,
        host=host,
        port=port,
        memsvc_port=memsvc_port,
        execsvc_port=execsvc_port,
        in_process=in_process,
        log_level=log_level,
        drain_grace=drain_grace,
        settings={name: str(value) for name, value in passed.items() if value is not None},
    )

    async def until_stopped(addresses: dict[str, str]) -> None:
        await _print_banner(addresses, log_dir)
        await asyncio.Event().wait()

    run_supervised(options, log_directory=log_dir, startup_timeout=startup_timeout, verbose=verbose, body=until_stopped)
    notices().print("stopped")


def run_service(name: str, arguments: list[str]) -> None:
    """Becomes `python -m NAME ARGUMENTS`."""
    argv = [sys.executable, "-m", name, *arguments]
    os.execve(sys.executable, argv, dict(os.environ))  # noqa: S606 - no shell is the point
