"""Journals: whoever reads one has what its writer wrote, however often it was away."""

from __future__ import annotations

import pytest

from memsvc.store import JournalPosition, Store, StoreFencedError
from tests.store.conftest import Kind


async def test_a_new_reader_gets_snapshot_and_entries_of_one_instant(store: Store) -> None:
    """Otherwise what changes between the two is lost or told twice."""
    journals = store.journals
    assert await journals.read("p", None, 100) is None
    await journals.begin("p", 1, "life", [b"s1", b"s2"])
    await journals.append("p", "life", 0, [b"a", b"b"])
    read = await journals.read("p", None, 100)
    assert read is not None
    assert (read.snapshot, read.entries) == ([b"s1", b"s2"], [b"a", b"b"])
    assert read.position == JournalPosition("life", 2)


async def test_a_reader_goes_on_from_where_it_was(store: Store) -> None:
    """Otherwise every read costs as much as the first."""
    journals = store.journals
    await journals.begin("p", 1, "life", [b"s"])
    await journals.append("p", "life", 0, [b"a", b"b", b"c"])
    first = await journals.read("p", None, 2)
    assert first is not None
    assert first.entries == [b"a", b"b"]
    rest = await journals.read("p", first.position, 2)
    assert rest is not None
    assert (rest.snapshot, rest.entries) == (None, [b"c"])
    assert (await journals.read("p", rest.position, 2)) is not None


async def test_a_reader_whose_position_was_trimmed_gets_the_snapshot(store: Store) -> None:
    """Otherwise it goes on as if nothing had been in between."""
    journals = store.journals
    await journals.begin("p", 1, "life", [b"s0"])
    await journals.append("p", "life", 0, [b"1", b"2", b"3", b"4"])
    await journals.checkpoint("p", "life", 4, [b"s4"], keep=2)
    await journals.append("p", "life", 4, [b"5"])
    behind = await journals.read("p", JournalPosition("life", 1), 100)
    assert behind is not None
    assert (behind.snapshot, behind.entries) == ([b"s4"], [b"5"])
    near = await journals.read("p", JournalPosition("life", 2), 100)
    assert near is not None
    assert (near.snapshot, near.entries) == (None, [b"3", b"4", b"5"])
    ahead = await journals.read("p", JournalPosition("life", 6), 100)
    assert ahead is not None
    assert ahead.snapshot == [b"s4"]


async def test_an_append_that_is_repeated_is_done_once(store: Store) -> None:
    """Otherwise an answer that was lost on the way doubles what it answered."""
    await store.journals.begin("p", 1, "life", [])
    await store.journals.append("p", "life", 0, [b"a", b"b"])
    await store.journals.append("p", "life", 0, [b"a", b"b"])
    read = await store.journals.read("p", None, 100)
    assert read is not None
    assert read.entries == [b"a", b"b"]


async def test_a_writer_that_left_something_out_is_fenced(store: Store) -> None:
    """Otherwise a hole in the journal is read as if it were whole."""
    await store.journals.begin("p", 1, "life", [])
    with pytest.raises(StoreFencedError):
        await store.journals.append("p", "life", 3, [b"d"])
    with pytest.raises(StoreFencedError):
        await store.journals.checkpoint("p", "life", 3, [b"s"], keep=0)
    with pytest.raises(StoreFencedError):
        await store.journals.renew("p", "life", 3)


async def test_a_writer_finds_out_that_everything_is_gone(kind: Kind) -> None:
    """Otherwise a flushed server stays empty."""
    await kind.store.journals.begin("p", 1, "life", [b"s"])
    await kind.store.journals.renew("p", "life", 0)
    kind.flush()
    with pytest.raises(StoreFencedError):
        await kind.store.journals.renew("p", "life", 0)
    with pytest.raises(StoreFencedError):
        await kind.store.journals.append("p", "life", 0, [b"a"])
    assert await kind.store.journals.read("p", None, 1) is None


async def test_an_older_epoch_does_not_take_a_journal_back(store: Store) -> None:
    """Otherwise a service that lost a pool writes over the one that has it."""
    await store.journals.begin("p", 2, "new", [b"s"])
    with pytest.raises(StoreFencedError):
        await store.journals.begin("p", 1, "old", [])
    await store.journals.begin("p", 3, "newer", [])
    with pytest.raises(StoreFencedError):
        await store.journals.append("p", "new", 0, [b"a"])
    await store.journals.end("p", "new")
    assert await store.journals.read("p", None, 1) is not None
    await store.journals.end("p", "newer")
    assert await store.journals.read("p", None, 1) is None


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
@pytest.mark.parametrize("damage", ["XTRIM entries", "DEL entries", "LTRIM snapshot", "DEL snapshot"])
async def test_a_journal_that_someone_else_cut_is_not_read(kind: Kind, damage: str, server: object) -> None:
    """Otherwise eviction or an operator's hand turns into a wrong state that looks right."""
    journals = kind.store.journals
    await journals.begin("p", 1, "life", [b"s1", b"s2"])
    await journals.append("p", "life", 0, [b"a", b"b", b"c"])
    command, _, part = damage.partition(" ")
    with server.client() as client:  # type: ignore[attr-defined]
        (key,) = client.keys(f"quire:{{journal/p}}:{part}*")
        arguments = {"XTRIM": ["MAXLEN", 1], "DEL": [], "LTRIM": [1, -1]}[command]
        client.execute_command(command, key, *arguments)
    assert await journals.read("p", None, 100) is None
    assert await journals.read("p", JournalPosition("life", 1), 100) is None
    with pytest.raises(StoreFencedError):
        await journals.append("p", "life", 3, [b"d"])
