"""Runs the container stack for real: build, up, stream an answer, read a block table, down.

    python -m scripts.compose_test [--cache DIRECTORY] [--keep]
    python -m scripts.compose_test --print-config gpu|cpu      # what Compose reads in the files; needs no engine

Uses the container engine that answers. Where none does and this is root on a Debian-like machine, it installs and
starts one for the time of the run, makes its base images from Debian packages if no registry answers, and afterwards
puts the network back as it was. Images, packages and Compose are kept in the cache directory
(~/.cache/quire/compose-test, about 3 GB; delete it at will), which makes the next run quick.

Exit status: 0 all is well; 1 a check failed; 77 skipped, because no engine can run here (the reason is printed); 130
interrupted.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
import fcntl
import os
from pathlib import Path
import signal
import sys
import time
from types import FrameType

from . import checks
from .console import CheckFailedError, EngineUnavailableError, run, say
from .engine import Engine, reachable_engine
from .images import provide_images
from .stack import FILES, Stack, find_compose, free_port
from .wheels import provide_wheels, served

PROJECT_DIRECTORY = Path(__file__).resolve().parent.parent.parent
_SKIPPED = 77
_INTERRUPTED = 130
_LOCK_SECONDS = 300


def _parse_arguments() -> argparse.Namespace:
    """Returns the command line's options."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compose_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, default=home / "quire" / "compose-test", help="where images are kept")
    parser.add_argument("--print-config", choices=("gpu", "cpu"), help="print the resolved compose files as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the stack up until Enter is pressed")
    return parser.parse_args()


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Holds the cache directory's lock; waits for another run, but not for ever."""
    deadline = time.monotonic() + _LOCK_SECONDS
    with (cache / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckFailedError(f"another run has held {cache}/lock for {_LOCK_SECONDS} s") from None
            time.sleep(1)
        yield


def _test(engine: Engine, cache: Path, *, keep: bool) -> None:
    """Brings the stack up, checks it and takes it down."""
    log = cache / "build.log"
    log.write_text("")
    command = tuple(find_compose(cache, engine.environment))
    with ThreadPoolExecutor(max_workers=1) as fetcher:
        # Both take a minute the first time, and each mostly waits for the network.
        wheels = fetcher.submit(provide_wheels, PROJECT_DIRECTORY, cache, log)
        images = provide_images(engine, log)
    stack = Stack(engine, command, PROJECT_DIRECTORY, log, free_port(), free_port(), images)
    with served(wheels.result(), engine) as variables:
        stack.build(variables)
    checks.check_images(stack)
    with ExitStack() as cleanup:
        cleanup.callback(stack.down)
        stack.up()
        say("up: all healthy")
        checks.check_hardening(stack)
        checks.check_store(stack)
        checks.check_command_line(stack)
        checks.check_stream_and_block_table(stack)
        if engine.own:
            checks.check_restart(stack)
        if keep:
            say(f"kept: gateway 127.0.0.1:{stack.gateway_port}, memsvc 127.0.0.1:{stack.memsvc_port}; Enter ends it")
            sys.stdin.readline()
    say("down: containers, networks and volumes are gone")
    if engine.own:
        # Layers that no tag leads to any more; what is left is the cache of the next run.
        engine.docker("image", "prune", "--force", timeout=120)


def _resolved_config(cache: Path, kind: str) -> str:
    """Returns what Compose makes of the files for machines with or without a GPU, as JSON and with default settings."""
    command = find_compose(cache, {})
    files = FILES if kind == "cpu" else FILES[:1]
    words = [word for name in files for word in ("--file", name)]
    own = {name: "" for name in os.environ if name.startswith("QUIRE_COMPOSE_")}
    words += ["--env-file", "/dev/null", "config", "--format", "json"]
    return run([*command, *words], timeout=60, env=own, cwd=PROJECT_DIRECTORY)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """Turns SIGTERM and SIGHUP into the exception that Ctrl-C raises, so that everything is taken down."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Runs the test and returns the exit status."""
    options = _parse_arguments()
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    options.cache.mkdir(parents=True, exist_ok=True)
    options.cache = options.cache.resolve()
    try:
        if options.print_config:
            sys.stdout.write(_resolved_config(options.cache, options.print_config))
            return 0
        with _alone(options.cache), reachable_engine(options.cache) as engine:
            _test(engine, options.cache, keep=options.keep)
    except EngineUnavailableError as error:
        say(f"SKIPPED, the containers were NOT tested: {error}")
        return _SKIPPED
    except CheckFailedError as error:
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything is taken down")
        return _INTERRUPTED
    say("passed: the containers ran and answered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
