"""A peer's own classes, measured by another interpreter while this one measures ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
import shutil
from typing import Any

from memsvc.bench.samples import Samples
from quire.errors import ConfigError, DeadlineError, QuireError

SCRIPT = Path(__file__).with_name("vllm_peer.py")
_START_SECONDS = 300.0
_ANSWER_SECONDS = 120.0
_LINE_LIMIT = 2**24
_REASON_LENGTH = 400


class Peer:
    """A running peer. Measurements are asked for one at a time, so that they alternate with ours.

    Args:
        python: an interpreter in which `vllm` can be imported.
        block_size: tokens in a block.
        script: what it runs.
    """

    def __init__(self, python: str, block_size: int, script: Path = SCRIPT) -> None:
        self._python = python
        self._block_size = block_size
        self._script = script
        self._process: asyncio.subprocess.Process | None = None
        self.about: dict[str, str] = {}

    async def start(self) -> None:
        """Starts the interpreter and waits until it has imported the peer.

        Raises:
            ConfigError: there is no such interpreter, or it cannot import vllm.
            DeadlineError: it does not answer.
        """
        found = shutil.which(self._python)
        if found is None:
            message = f"--peer: {self._python!r} is not a program; expected a Python in which vllm is installed"
            raise ConfigError(message, field="peer")
        self._process = await asyncio.create_subprocess_exec(
            found,
            str(self._script),
            str(self._block_size),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_LIMIT,
        )
        answer = await self._read(_START_SECONDS)
        if "error" in answer:
            reason = str(answer["error"])[:_REASON_LENGTH]
            await self.close()
            raise ConfigError(f"--peer: {self._python} cannot run vllm: {reason}", field="peer")
        self.about = {name: str(value) for name, value in answer.items()}

    async def sample(self, measurement: str) -> Samples:
        """Returns the samples of one measurement, by name.

        Raises:
            QuireError: the peer failed at it, or does not answer.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(f"{measurement}\n".encode())
        await process.stdin.drain()
        answer = await self._read(_ANSWER_SECONDS)
        if "error" in answer:
            message = f"the peer failed at {measurement}: {str(answer['error'])[:_REASON_LENGTH]}"
            raise QuireError(message, reason="PEER_FAILED")
        return {name: [float(value) for value in values] for name, values in answer.items()}

    async def close(self) -> None:
        """Ends the interpreter."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _read(self, seconds: float) -> dict[str, Any]:
        """Returns the next line that the peer writes."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), seconds)
        except TimeoutError:
            await self.close()
            raise DeadlineError(f"--peer: {self._python} did not answer within {seconds:g} s") from None
        if not line:
            return {"error": f"it ended with status {await process.wait()}; is that a Python with vllm?"}
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            return {"error": f"it wrote {line[:80]!r}, not an answer"}
        return answer
