"""A peer in a process: started with its model, asked for one measurement after the other."""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import selectors
import shutil
import subprocess
import tempfile
import time
from typing import IO, Any, Final, Self

from quire.errors import ConfigError, QuireError

SCRIPTS: Final[dict[str, str]] = {"vllm": "vllm_script.py", "llamacpp": "llamacpp_script.py"}
"""Peers that are known, and what runs in their interpreter."""
ALONE: Final = "executor alone"
"""Kind of our own engine, without gateway, memsvc and gRPC."""
_START_SECONDS: Final = 600.0
_ASK_SECONDS: Final = 600.0
_STOP_SECONDS: Final = 10.0
_READ_BYTES: Final = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class PeerChoice:
    """A peer that a user asked for."""

    kind: str
    """A key of SCRIPTS, or ALONE."""
    python: str
    model: str
    """A GGUF file for llamacpp, a directory for vllm."""

    @property
    def name(self) -> str:
        """As which it is reported: the kind and its model's file."""
        return self.kind if self.kind == ALONE else f"{self.kind} {Path(self.model).name}"

    @property
    def command(self) -> list[str]:
        """What is run, without its argument."""
        if self.kind == ALONE:
            return [self.python, "-m", "execsvc.bench.alone"]
        return [self.python, str(Path(__file__).parent / SCRIPTS[self.kind])]


def _pairs(text: str, flag: str) -> Iterable[tuple[str, str]]:
    """Yields the parts of "NAME=VALUE,.."; raises ConfigError."""
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in SCRIPTS or not value:
            message = f"--{flag}: found {part!r}, expected NAME=PATH with a name of {', '.join(SCRIPTS)}"
            raise ConfigError(message, field=flag.replace("-", "_"))
        yield name, value


def choices(peers: str, models: str) -> list[PeerChoice]:
    """Returns the peers of `--peer` with the models of `--peer-model`; one that has several runs once for each.

    Args:
        peers: NAME=PYTHON,..
        models: NAME=PATH,..

    Raises:
        ConfigError: a name is unknown, a program or a model is not there.
    """
    pythons = dict(_pairs(peers, "peer"))
    found = []
    for name, path in _pairs(models, "peer-model"):
        if name not in pythons:
            message = f"--peer-model: found {name!r}, which --peer does not name"
            raise ConfigError(message, field="peer_model")
        if not Path(path).exists():
            raise ConfigError(f"--peer-model: {path!r} is not there", field="peer_model")
        found.append(PeerChoice(name, pythons[name], path))
    for name, python in pythons.items():
        if shutil.which(python) is None:
            raise ConfigError(f"--peer: {python!r} is not a program; expected a Python with {name}", field="peer")
        if all(choice.kind != name for choice in found):
            raise ConfigError(f"--peer-model: none for {name}; expected {name}=PATH", field="peer_model")
    return found


class Peer:
    """A running peer. A context manager; answers are documents.

    Args:
        choice: which.
        threads: that it is told to compute on.
        max_model_len: tokens of the longest sequence.
        max_num_seqs: sequences at once.

    Raises:
        QuireError: it does not start.
    """

    def __init__(self, choice: PeerChoice, threads: int, max_model_len: int, max_num_seqs: int) -> None:
        self.name = choice.name
        self._rest = b""
        arguments = {"model": choice.model, "threads": threads, "len": max_model_len, "seqs": max_num_seqs}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the peer
        self._process = subprocess.Popen(  # noqa: S603 - the interpreter that the user named
            [*choice.command, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)} | ({} if choice.kind == ALONE else {"PYTHONPATH": ""}),
        )
        try:
            self.about = self._answer(_START_SECONDS)
        except BaseException:
            self.close()
            raise
        """What it says of itself: version and threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, **request: object) -> dict[str, Any]:
        """Has it measure something; raises QuireError if it fails or does not answer in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failure(f"ended: {error}") from error
        return self._answer(_ASK_SECONDS)

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(_STOP_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failure(f"did not answer within {seconds:g} s")
                data = os.read(self._process.stdout.fileno(), _READ_BYTES)
                if not data:
                    raise self._failure(f"ended with status {self._process.wait(_STOP_SECONDS)}")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        document: dict[str, Any] = json.loads(line)
        return document

    def _failure(self, what: str) -> QuireError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return QuireError(
            f"the peer {self.name} {what}; its last line: {(lines or ['none'])[-1]}", reason="PEER_FAILED"
        )
