"""The `quire` command: its sub-commands, and what becomes of errors.

Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final

import typer

import quire
from quire.cli import (
    bench,
    bench_kernels,
    cache,
    demo,
    generate,
    history,
    inspect,
    leaks,
    locate,
    prefixes,
    quota,
    replay,
    residencies,
    serve,
    sessions,
    simulate,
    sizes,
    top,
)
from quire.cli.output import print_error
from quire.errors import ConfigError, QuireError

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

# typer carries click within itself from 0.26 on and used click's own before: both have this class at the root.
_USAGE_ERROR: Final[type[Any]] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

_HINTS: Final = {
    "UNREACHABLE": "is it running? start it with `quire serve --model smollm2`, or name it with --address or --memsvc",
    "CONNECTION_LOST": "the services' logs may say why; `quire health` asks whether they are back",
    "PORT_IN_USE": "choose another with {field}, or 0 for any free one; `quire health` tells whether Quire has it",
    "MODEL_NOT_FOUND": "leave --model out if only one model is served",
    "SEQUENCE_NOT_FOUND": "`quire sequences` lists those that hold blocks; finished ones hold none",
    "POOL_NOT_FOUND": "`quire pools` lists them",
    "PIN_QUOTA": "`quire quota POOL TENANT --pinned BLOCKS` allows more",
    "CACHE_IN_USE": "--force has the sequences computed again; their clients see a pause",
    "METHOD_UNKNOWN": "is that the right service? With --in-process there is no memsvc to look into",
    "TOO_MANY_WATCHERS": "end another `quire top`, or look once with `quire pools`",
    "QUEUE_FULL": "the server is busy, try again later",
    "NO_DEVICE": "run it where torch.cuda.is_available() is true; nothing was measured or written",
    "DEADLINE_EXCEEDED": "allow more time with --timeout",
}

app = typer.Typer(
    name="quire",
    help="Serve large language models from a paged KV cache, and look into it.",
    epilog="Start with: quire serve --model smollm2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - called by typer
    if wanted:
        typer.echo(f"quire {quire.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve large language models from a paged KV cache, and look into it."""
    del version


_PASSED_ON: Final = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

app.command()(serve.serve)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(sessions.sessions)
app.command()(inspect.health)
app.command()(inspect.pools)
app.command()(inspect.sequences)
app.command()(top.top)
app.command()(inspect.blocks)
app.command()(inspect.block)
app.command()(history.history)
app.command()(locate.locate)
app.command()(cache.reset)
app.command()(prefixes.explain)
app.command()(prefixes.prefixes)
app.command()(prefixes.pin)
app.command()(prefixes.release)
app.command()(prefixes.evict)
app.command()(leaks.leaks)
app.command()(replay.replay)
app.command()(quota.quota)
app.command()(residencies.residencies)
app.command()(simulate.simulate)
app.command()(sizes.sizes)
app.command()(bench_kernels.tune)
app.add_typer(bench.app)


@app.command("memsvc", context_settings=_PASSED_ON)
def _memsvc(context: typer.Context) -> None:
    """Run the memory service alone: every option is its own, see `quire memsvc --help`."""
    serve.run_service("memsvc", context.args)


@app.command("execsvc", context_settings=_PASSED_ON)
def _execsvc(context: typer.Context) -> None:
    """Run an executor alone: every option is its own, see `quire execsvc --help`."""
    serve.run_service("execsvc", context.args)


@app.command("gateway", context_settings=_PASSED_ON)
def _gateway(context: typer.Context) -> None:
    """Run the gateway alone: every option is its own, see `quire gateway --help`."""
    serve.run_service("gateway", context.args)


def _report(error: QuireError) -> int:
    """Prints what failed and returns the exit status."""
    hint = _HINTS.get(error.reason, "").format(field=error.field)
    if not hint and "log" in error.metadata:
        hint = f"the whole log is {error.metadata['log']}"
    print_error(error.message, hint)
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    try:
        return app(arguments, prog_name="quire", standalone_mode=False) or EXIT_OK
    except QuireError as error:
        return _report(error)
    except _USAGE_ERROR as error:
        if not error.format_message():
            # No command was given, and the help has been shown.
            return EXIT_USAGE
        command = getattr(getattr(error, "ctx", None), "command_path", "quire")
        print_error(error.format_message(), f"{command} --help")
        return EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; what Python would still flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run())


if __name__ == "__main__":
    main()
