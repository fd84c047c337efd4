"""`python -m memsvc.replay FILE`: replays a file of the command log, and prints what was then as one JSON document."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
import sys
from typing import Any, Final

from memsvc.core import snapshot, views
from memsvc.core.commands import COMMANDS
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.log_files import Replayed, replay_file
from quire.errors import QuireError

_SEQUENCE_LIMIT: Final = 2**31


def describe(replayed: Replayed) -> dict[str, Any]:
    """Returns a replayed state as a document."""
    last = replayed.last
    spec = COMMANDS.get(last.command) if last is not None else None
    return {
        "first": replayed.first,
        "entries": replayed.count,
        "last_command": last.command if last is not None else "",
        "last_at": spec.argument("now", last.args, last.kwargs) if spec is not None and last is not None else None,
        "torn": replayed.is_torn,
        "checked": replayed.is_checked,
        "digest": snapshot.digest(replayed.core).hex(),
        "gateways": [dataclasses.asdict(gateway) for gateway in replayed.core.gateways],
        "pools": [_pool(replayed.core, pool_id) for pool_id in sorted(replayed.core.pools)],
        "sequences": [_sequence(view) for view in views.list_sequences(replayed.core, "", -1, _SEQUENCE_LIMIT)],
    }


def _pool(core: MemoryCore, pool_id: str) -> dict[str, Any]:
    view = views.view_pool(core, pool_id)
    return {
        "pool_id": pool_id,
        "epoch": view.pool.epoch,
        "ready": view.pool.ready,
        "spec": dataclasses.asdict(view.pool.registration.spec),
        "blocks": {state.name.lower(): view.count(state) for state in BlockState},
        "used_token_count": view.used_token_count,
        "utilization": view.utilization,
    }


def _sequence(view: views.SequenceView) -> dict[str, Any]:
    record = view.record
    return {
        "sequence_id": record.sequence_id,
        "pool_id": view.pool_id,
        "epoch": view.epoch,
        "table": record.table,
        "gateway_id": view.gateway_id,
        "tenant": record.tenant,
        "state": record.state.name.lower(),
        "token_count": view.token_count,
        "written_token_count": view.written_token_count,
        "block_ids": list(record.blocks),
    }


def main() -> None:
    """Runs the command: a document on stdout, of the state or of the error; exit status 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m memsvc.replay", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--until", type=int, default=None, metavar="N", help="replay only the first N commands")
    options = parser.parse_args()
    try:
        document = describe(replay_file(options.file, options.until))
    except QuireError as error:
        document = {"error": {"message": error.message, "reason": error.reason, "field": error.field}}
    json.dump(document, sys.stdout)
    sys.exit(1 if "error" in document else 0)


if __name__ == "__main__":
    main()
