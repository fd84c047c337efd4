"""The state is the fold of the commands, and the log tells what happened."""

from __future__ import annotations

import pytest

from memsvc.core import snapshot
from memsvc.core.replay import decode_entry, encode_entry, replay, replay_segments
from quire.errors import BlockPoolExhaustedError
from tests.conformance.memory_connections import prompt
from tests.conformance.memory_rig import Rig


async def work(rig: Rig, seed: int) -> None:
    """Has sequences share, copy, grow, run short and end."""
    other = rig.connect_raw(f"other-{seed}")
    await other.start()  # type: ignore[attr-defined]
    first = await rig.admit(prompt(40, seed), tenant="t", request_id=f"first-{seed}")
    await first.write()
    await first.extend(prompt(30, seed + 1))
    second = await rig.admit(prompt(70, seed), other, tenant="t", request_id=f"second-{seed}")
    with pytest.raises(BlockPoolExhaustedError):
        await rig.admit(prompt(32 * 16, seed + 2))
    await first.close()
    await second.write(50)
    await rig.lease(2, other)
    await rig.run(prompt(100, seed))
    await other.close()


async def test_row_80_commands_from_the_start_or_from_a_snapshot_give_the_same_state_bit_for_bit(rig: Rig) -> None:
    """Otherwise what a log shows is not what was, and no report can be explained by it."""
    await work(rig, 3)
    assert rig.log.rotate()
    start, tail = rig.log.segments
    assert snapshot.digest(replay_segments([start])) == snapshot.digest(tail.base)
    await work(rig, 8)
    expected = snapshot.digest(rig.core)
    assert snapshot.digest(replay_segments([start, tail])) == expected
    assert snapshot.digest(replay_segments([tail])) == expected
    elsewhere = snapshot.decode(snapshot.encode(tail.base))
    entries = [decode_entry(encode_entry(entry)) for entry in tail.entries()]
    assert snapshot.digest(replay(elsewhere, entries)) == expected
    assert len(start.lines) > 10 < len(entries)
    assert snapshot.digest(replay(start.base, list(start.entries())[:-1])) != snapshot.digest(tail.base)
