"""`quire demo`: the whole of Quire in one command, with a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import grpc
from rich.text import Text
import typer

from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc
from quire.cli.drawing import count_remark, draw_block_table
from quire.cli.output import console, notices, print_text
from quire.cli.serve import LOG_DIRECTORY, STARTUP_TIMEOUT, run_supervised
from quire.client import AsyncClient, AsyncStream
from quire.errors import InvariantError
from quire.generation import Delta, Generation, Message
from quire.rpc import open_channel
from quire.serve.plan import ServeOptions

_QUESTION: Final = "Explain in a few sentences why the sky is blue."
_ADMIN_SECONDS: Final = 5.0


class _TableWatch:
    """Looks at a sequence's block table while its answer streams; keeps the last look."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Prepares to ask memsvc over `channel`."""
        self._admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.last: admin_pb2.GetBlockTableResponse | None = None

    async def look(self, request_id: str) -> None:
        """Fetches the table of the first sample; keeps the former look if the sequence is gone."""
        request = admin_pb2.GetBlockTableRequest(sequence_id=f"{request_id}/0")
        try:
            self.last = await self._admin.GetBlockTable(request, timeout=_ADMIN_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise


async def _stream_answer(stream: AsyncStream, watch: _TableWatch) -> Generation:
    """Prints the answer as it comes, with a look at the block table after each piece."""
    async for event in stream:
        if isinstance(event, Delta):
            print_text(event.text)
            await watch.look(stream.request_id)
    print_text("\n\n")
    return await stream.result()


def _report(answer: Generation, table: admin_pb2.GetBlockTableResponse | None) -> None:
    """Shows the block table and what the answer cost.

    Raises:
        InvariantError: the blocks of the table do not match its tokens.
    """
    if table is None:
        raise InvariantError("the sequence ended before its block table could be seen")
    printer = console()
    printer.print(draw_block_table(table, printer.width), soft_wrap=True)
    right, sentence = count_remark(table, table.sequence.token_count)
    printer.print(Text(f"{sentence}: {'as it should be' if right else 'that is wrong'}", "green" if right else "red"))
    usage = answer.usage
    printer.print(
        f"{usage.prompt_token_count} tokens of prompt and {usage.completion_token_count} of answer in "
        f"{usage.total_seconds:.1f} s, the first after {usage.time_to_first_token_seconds:.2f} s\n",
        soft_wrap=True,
    )
    if not right:
        raise InvariantError(f"block table of {table.sequence.sequence_id}: {sentence}")


def demo(
    *,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")] = _QUESTION,
    model: Annotated[
        str, typer.Option(metavar="PATH|smollm2", help="GGUF file, model directory, or smollm2.")
    ] = "smollm2",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 160,
    log_dir: Annotated[Path, typer.Option(help="Where the services log.")] = LOG_DIRECTORY,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all that is logged.")] = False,
) -> None:
    """Start everything on free ports, stream one answer, show its block table, and stop.

    For example:

        quire demo

        quire demo "What is a quire of paper?" --max-tokens 64
    """

    async def show(addresses: dict[str, str]) -> None:
        admin = open_channel(addresses.get("memsvc", addresses["gateway"]))
        async with AsyncClient(addresses["gateway"]) as client, admin:
            watch = _TableWatch(admin)
            console().print(Text(f"\n> {question}\n", "bold"))
            messages = [Message("user", question)]
            async with client.stream_chat(messages, temperature=0, max_tokens=max_tokens) as stream:
                answer = await _stream_answer(stream, watch)
        _report(answer, watch.last)

    options = ServeOptions(model=model, port=0, memsvc_port=0, execsvc_port=0, drain_grace=5.0)
    run_supervised(options, log_directory=log_dir, startup_timeout=STARTUP_TIMEOUT, verbose=verbose, body=show)
    notices().print("everything is stopped again; `make up` or `quire serve` keeps it running")
