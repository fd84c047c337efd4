"""The state is the fold of the commands, and the log tells what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memsvc.core import snapshot
from memsvc.core.replay import decode_entry, encode_entry, replay, replay_segments
from memsvc.log_files import Replayed, replay_file
from memsvc.replay import describe
from protos.memsvc.v1 import admin_pb2
from quire.errors import (
    BlockNotFoundError,
    BlockPoolExhaustedError,
    InvalidRequestError,
    PoolNotFoundError,
    SequenceNotFoundError,
    UnsupportedError,
)
from tests.conformance.memory_connections import POOL_ID, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig, test_config


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
    assert rig.log is not None
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


async def page(rig: Rig, **fields: Any) -> list[admin_pb2.HistoryRecord]:
    """Returns all records, read in pages of two."""
    records: list[admin_pb2.HistoryRecord] = []
    token = ""
    while True:
        answer = await rig.admin.History(admin_pb2.HistoryRequest(page_size=2, page_token=token, **fields))
        assert len(answer.records) <= 2
        records += answer.records
        token = answer.next_page_token
        if not token:
            assert [record.place for record in records] == sorted(record.place for record in records)
            return records


async def test_history_tells_who_had_a_block_and_what_became_of_it(rig: Rig) -> None:
    """Otherwise nobody can say afterwards how two sequences came to share a block, or why one lost it."""
    first = await rig.run(prompt(40), request_id="first")
    second = await rig.admin.GetPool(admin_pb2.GetPoolRequest(pool_id=POOL_ID))
    assert second.pool.cached_block_count == 3
    again = await rig.admit(prompt(40), request_id="second")
    assert again.blocks[0] == first.blocks[0]
    created, *records = await page(rig, pool_id=POOL_ID, block_id=first.blocks[0])
    assert (created.command, created.block_after.state) == ("register_pool", admin_pb2.BLOCK_STATE_FREE)
    states = [
        (record.command, record.sequence_id, record.block_after.state, record.block_after.matchable)
        for record in records
    ]
    used, cached = admin_pb2.BLOCK_STATE_USED, admin_pb2.BLOCK_STATE_CACHED
    assert states == [
        ("admit", "first/0", used, False),
        ("journal", "first/0", used, True),
        ("journal", "first/0", cached, True),
        ("admit", "second/0", used, True),
    ]
    assert records[0].block_before.state == admin_pb2.BLOCK_STATE_FREE
    assert {record.gateway_id for record in records} == {"gateway-0"}
    assert [record.block_after.generation for record in records] == [1, 1, 1, 1]
    assert "second/0" in records[3].explanation
    await again.close()
    await rig.admit(prompt(32 * 16, 5), request_id="large")
    last = (await page(rig, pool_id=POOL_ID, block_id=first.blocks[0]))[-1]
    assert last.explanation.startswith("Its content was forgotten to make room; used: in 1 block table (large/0)")
    assert last.block_after.generation == 2


async def test_history_tells_how_a_sequence_grew_and_ended(rig: Rig) -> None:
    """Otherwise a sequence that is gone cannot be asked about."""
    sequence = await rig.admit(prompt(20), request_id="abc-1")
    await sequence.write()
    await sequence.extend(prompt(20, 2))
    await sequence.close()
    await rig.admit(prompt(5, 7), request_id="abd-2")
    for name in ("abc-1", "abc-1/0", "abc"):
        records = await page(rig, sequence_id=name)
        assert [record.command for record in records] == ["admit", "journal", "journal", "journal"]
        assert {record.sequence_id for record in records} == {"abc-1/0"}
        assert [record.sequence_after.block_count for record in records] == [2, 2, 3, 0]
        assert records[-1].HasField("sequence_before") and not records[-1].HasField("sequence_after")
    with pytest.raises(InvalidRequestError, match="begins 2 requests"):
        await page(rig, sequence_id="ab")
    with pytest.raises(SequenceNotFoundError):
        await page(rig, sequence_id="zz")


async def test_history_of_everything_names_each_command(rig: Rig) -> None:
    """Otherwise what happened around an event cannot be seen."""
    await rig.run(prompt(20))
    commands = [record.command for record in await page(rig, pool_id=POOL_ID)]
    assert commands[:4] == ["register_pool", "admit", "journal", "journal"]
    everything = [record.command for record in await page(rig)]
    assert "connect_gateway" in everything
    assert len(everything) > len(commands)


async def test_history_refuses_what_cannot_be_asked(rig: Rig) -> None:
    """A question that is not understood must not be answered with something else."""
    for fields, kind in (
        ({"pool_id": "none"}, PoolNotFoundError),
        ({"pool_id": POOL_ID, "block_id": 33}, BlockNotFoundError),
        ({"block_id": 3}, InvalidRequestError),
        ({"pool_id": POOL_ID, "sequence_id": "x"}, InvalidRequestError),
        ({"page_token": "?"}, InvalidRequestError),
    ):
        with pytest.raises(kind):
            await rig.admin.History(admin_pb2.HistoryRequest(**fields))


async def test_a_service_without_a_log_says_so() -> None:
    """An empty history would read as if nothing had happened."""
    async with grpc_rig(spec(), test_config(command_log_mib=0)) as opened:
        with pytest.raises(UnsupportedError, match="no command log is kept"):
            await opened.admin.History(admin_pb2.HistoryRequest())


def replayed(folder: Path) -> list[Replayed]:
    """Returns the files in a folder, replayed, in the order of their names."""
    return [replay_file(path) for path in sorted(folder.iterdir())]


async def test_files_of_a_busy_service_follow_one_another_and_each_gives_the_state_it_had(tmp_path: Path) -> None:
    """A recorder that loses a command at the change of files explains nothing from then on."""
    config = test_config(command_log_mib=1, log_dir=str(tmp_path))
    async with grpc_rig(spec(300), config) as opened:
        for turn in range(110):
            await opened.run(prompt(4000, turn % 5), request_id=f"r{turn}")
        assert opened.log is not None
        assert opened.log.first > 0, "nothing was dropped"
        end = opened.log.end
    files = replayed(tmp_path)
    assert len(files) > 2
    assert all(file.is_checked and not file.is_torn for file in files)
    assert [file.first + file.count for file in files[:-1]] == [file.first for file in files[1:]]
    assert files[-1].first + files[-1].count >= end
    assert sum(len(describe(file)["pools"]) for file in files) == len(files)


async def test_history_tells_which_samples_share_a_block_after_a_fork(rig: Rig) -> None:
    """Samples that share a block are the reason why one of them copied it."""
    first = await rig.admit(prompt(40), request_id="many")
    await first.write()
    await first.fork(2, first_sample_index=1)
    last = (await page(rig, pool_id=POOL_ID, block_id=first.blocks[0]))[-1]
    assert (last.command, last.block_after.ref_count) == ("fork", 3)
    assert last.explanation.startswith("Shared: in 3 block tables (many/0, many/1, many/2)")
    (forked,) = await page(rig, sequence_id="many/2")
    assert forked.explanation.startswith("Forked as table")
    assert {record.sequence_id for record in await page(rig, sequence_id="many")} == {"many/0", "many/1", "many/2"}
