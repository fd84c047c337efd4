"""`quire replay`: the state that a file of the command log leads to."""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys
from typing import Annotated, Any

import typer

from quire.cli.options import Json
from quire.cli.output import console, notices, print_json, print_table
from quire.errors import ConfigError, CorruptionError, QuireError


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that memsvc wrote to its --log-dir.")],
    *,
    until: Annotated[int | None, typer.Option(min=0, metavar="N", help="Replay only the first N commands.")] = None,
    as_json: Json = False,
) -> None:
    """Rebuild the state of a memory service from a file of its command log, and show its pools and block tables.

    For example:

        quire replay .quire/commands/memsvc-01764041652000-000000000000.quirelog

        quire replay FILE --until 1200 --json | jq .pools
    """
    command = [sys.executable, "-m", "memsvc.replay", str(file)]
    command += ["--until", str(until)] if until is not None else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        message = f"the replay ended with status {done.returncode}: {last}"
        raise QuireError(message, reason="REPLAY_FAILED") from None
    error = document.get("error")
    if error is not None:
        known = {cls.default_reason: cls for cls in (ConfigError, CorruptionError)}
        raise known.get(error["reason"], QuireError)(error["message"], reason=error["reason"], field=error["field"])
    if as_json:
        print_json(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    """Prints a state for people."""
    console().print(f"{document['entries']:,} commands replayed; the state is {document['digest']}", soft_wrap=True)
    states = ("used", "cached", "pending", "leased", "free")
    counts = [(state.upper(), True) for state in states]
    print_table(
        [("POOL", False), ("EPOCH", True), ("READY", False), *counts, ("TOKENS", True)],
        [
            (pool["pool_id"], pool["epoch"], "yes" if pool["ready"] else "lost",
             *(pool["blocks"][state] for state in states), pool["used_token_count"])
            for pool in document["pools"]
        ],
    )  # fmt: skip
    if document["sequences"]:
        headings = [("SEQUENCE", False), ("GATEWAY", False), ("STATE", False), ("TOKENS", True), ("WRITTEN", True)]
        print_table(
            [*headings, ("BLOCKS", False)],
            [
                (each["sequence_id"], each["gateway_id"], each["state"], each["token_count"],
                 each["written_token_count"], _ranges(each["block_ids"]))
                for each in document["sequences"]
            ],
        )  # fmt: skip
    if document["torn"]:
        notices().print("the file breaks off: what was being written when its service ended is lost")
    if document["checked"]:
        notices().print("equal to the state that the service had")


def _ranges(blocks: list[int]) -> str:
    """Returns block numbers in order, runs of them as "first-last"."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and block == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], block]
        else:
            parts.append([block])
    return " ".join("-".join(map(str, part)) for part in parts)
