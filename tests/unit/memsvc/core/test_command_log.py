"""The command log and snapshots: nothing is left out, nothing is shared, and garbage is refused."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest

from memsvc.core import codec, snapshot
from memsvc.core import log as log_module
from memsvc.core.codec import state_of
from memsvc.core.commands import COMMANDS
from memsvc.core.log import CommandLog, Entry
from memsvc.core.memory import MemoryCore
from memsvc.core.replay import apply, decode_entry, encode_entry, replay, replay_segments
from memsvc.core.tenancy import TenantQuota
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from quire.columns import pack
from quire.errors import BlockPoolExhaustedError, CorruptionError, InvalidRequestError
from quire.memory import AdmitRequest, CloseReason, JournalEntry, PoolSpec

POOL = "executor"
LOOKS = {
    "forget_roots",
    "gateway",
    "granted_total",
    "journal_no",
    "locate",
    "pool",
    "prefix_root",
    "published",
    "registered_epoch",
    "take_cache_events",
    "take_events",
    "explain_prefix",
    "tenant_tag",
}
"""Public methods of the core that change nothing of its state."""
COMPOSED = {"expire"}
"""Public methods that change the state by calling commands alone, each of which is taken down."""


def request(name: str, tokens: list[int], **fields: Any) -> AdmitRequest:
    """Returns a request for the pool of these tests."""
    return AdmitRequest(POOL, 1, name, 0, pack(tokens), **fields)


def tell(core: MemoryCore, number: int, now: float, **fields: Any) -> None:
    """Applies a journal."""
    core.journal(number, POOL, 1, packed(JournalEntry(POOL, 1, **fields)), now)


def live(core: MemoryCore) -> MemoryCore:
    """Has a bit of everything happen: hits, copies, leases, recalls, duplicates, a dead gateway, a forgotten block."""
    core.register_pool(PoolRegistration(POOL, 7, "h:1", PoolSpec(25, 16, 1, "model", "float32", 160)), 1, 1.0)
    core.heartbeat(POOL, 7, 1.5)
    one = core.connect_gateway("one", 11, 2.0)
    two = core.connect_gateway("two", 12, 2.0)
    core.touch_gateway(one, now=2.5)
    core.set_quota(POOL, "t", TenantQuota(floor=2, ceiling=20))
    for turn, (number, length) in enumerate(itertools.product((one, two), (40, 40, 50, 37))):
        count = length + turn % 2
        opened = core.admit(number, request(f"r{turn}", list(range(count)), tenant="t" * (turn % 3)), 3.0 + turn)
        tell(core, number, 3.5 + turn, tables=[opened.table], token_starts=[count], token_counts=[0],
             written_counts=[count])  # fmt: skip
        if turn % 3:
            tell(core, number, 3.6 + turn, closed=[opened.table], close_reasons=[CloseReason.FINISHED])
    blocks = core.lease(one, POOL, 1, 3, 20.0)
    tell(core, one, 21.0, appended=[1, 3, blocks[0]], tables=[1], token_starts=[40], token_counts=[1], token_ids=[9],
         written_counts=[40])  # fmt: skip
    core.admit(two, request("large", [8] * 160), 22.0)
    with pytest.raises(BlockPoolExhaustedError):
        core.admit(two, request("larger", [9] * 160), 22.0)
    core.disconnect_gateway(two, 23.0)
    core.extend_leases(0.25)
    return core


def new_core(**fields: Any) -> MemoryCore:
    """Returns a core with what the tests switch on."""
    return MemoryCore(b"secret of this test", lease_ttl=3.0, **fields)


def objects(found: Any, path: str = "core") -> list[tuple[str, Any]]:
    """Returns every object with a state of its own within a core, and where it is."""
    if type(found) in snapshot.DERIVED:
        inner = [(path, found)]
        for name, value in state_of(found, snapshot.DERIVED[type(found)]).items():
            inner += objects(value, f"{path}.{name}")
        return inner
    if isinstance(found, dict):
        return [item for key, value in found.items() for item in objects(value, f"{path}[{key}]")]
    if isinstance(found, list):
        return [item for at, value in enumerate(found) for item in objects(value, f"{path}[{at}]")]
    return []


def changed(value: Any) -> Any:
    """Returns another value of the same kind."""
    if isinstance(value, np.ndarray | memoryview | bytearray):
        other = value.copy() if isinstance(value, np.ndarray) else type(value)(bytearray(bytes(value)))
        other = other if not isinstance(value, memoryview) else other.cast("B").cast(value.format)
        flat = other.reshape(-1) if isinstance(other, np.ndarray) else other
        flat[-1] = 0 if flat[-1] else 1
        return other
    if isinstance(value, bool):
        return not value
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{dataclasses.fields(value)[0].name: changed(getattr(value, dataclasses.fields(value)[0].name))}
        )
    other_values: dict[type, Any] = {int: 77_777, float: 0.125, str: "other", bytes: b"other"}
    if type(value) in other_values:
        return other_values[type(value)]
    return type(value)([*value, 3]) if isinstance(value, list | set) else None


def test_every_public_method_is_a_command_or_known_to_change_nothing() -> None:
    """A command that is not taken down is a difference after every replay, found when a report cannot be explained."""
    members = {name: getattr(MemoryCore, name) for name in dir(MemoryCore) if not name.startswith("_")}
    public = {name for name, found in members.items() if callable(found)}
    assert public == COMMANDS.keys() | LOOKS | COMPOSED
    assert not COMMANDS.keys() & (LOOKS | COMPOSED)


def test_looking_changes_no_state() -> None:
    """Otherwise a service that is looked at is not the one that its log tells of."""
    core = live(new_core(cache_events=True))
    before = snapshot.digest(core)
    core.locate(request("seen", list(range(60))))
    core.locate(request("seen", [*range(32), 5, 6, 7], tenant="tt"))
    core.prefix_root(POOL, tenant="never seen")
    core.published(POOL)
    core.registered_epoch(core.pool(POOL).registration)
    core.granted_total(1, POOL)
    core.journal_no(1, POOL)
    core.forget_roots()
    core.take_cache_events(POOL)
    core.take_events()
    assert snapshot.digest(core) == before


def test_every_field_counts() -> None:
    """A field that the digest leaves out may differ after a replay without anybody noticing."""
    core = live(new_core(forecast=True))
    expected = snapshot.digest(core)
    for path, found in objects(core):
        derived = snapshot.DERIVED[type(found)]
        fields = set(codec.fields_of(type(found))) or set(vars(found))
        assert derived <= fields, f"{path}: {derived - fields} are no fields"
        for name in fields - derived:
            before = getattr(found, name)
            other = changed(before)
            if type(before) in snapshot.DERIVED or isinstance(before, dict) or other is None:
                continue
            setattr(found, name, other)
            assert snapshot.digest(core) != expected, f"{path}.{name} does not count"
            setattr(found, name, before)
    assert snapshot.digest(core) == expected


def test_a_class_or_a_value_that_snapshots_do_not_know_is_an_error() -> None:
    """Otherwise what somebody adds to the core is left out in silence."""
    core = live(new_core())
    core.pool(POOL).memory.statistics = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="object"):
        snapshot.digest(core)
    with pytest.raises(TypeError, match="object"):
        snapshot.clone(core)


@pytest.mark.parametrize("forecast", [False, True])
def test_a_copy_shares_no_memory_and_goes_on_alike(forecast: bool) -> None:
    """A snapshot that changes with the core is no snapshot; one whose views point elsewhere answers wrongly later."""
    core = live(new_core(forecast=forecast))
    expected = snapshot.digest(core)
    for copy in (snapshot.clone(core), snapshot.decode(snapshot.encode(core))):
        assert snapshot.digest(copy) == expected
        columns = dict(objects(core))
        for path, found in objects(copy):
            for name, value in state_of(found).items():
                if isinstance(value, np.ndarray):
                    assert not np.shares_memory(value, getattr(columns[path], name)), f"{path}.{name}"
        prefix, pool = copy.pool(POOL).memory.prefix, copy.pool(POOL).memory.pool
        assert np.shares_memory(prefix._tenants, pool.tenant)
        assert np.shares_memory(np.asarray(prefix.token_words), prefix.tokens)
        assert np.shares_memory(np.asarray(prefix._published), prefix.published)
    mirror = snapshot.clone(core)
    for each in (core, mirror):
        each.fenced(POOL, 1, 2, 30.0)
        each.admit(1, request("later", list(range(60)), tenant="tt"), 31.0)
        each.expire(99.0)
    assert snapshot.digest(core) == snapshot.digest(mirror) != expected


@pytest.mark.parametrize("forecast", [False, True])
def test_a_copy_in_the_memory_of_another_is_as_good(forecast: bool) -> None:
    """What is left of an older state in a snapshot is a difference that no replay explains."""
    busy, idle = live(new_core(forecast=forecast)), new_core(forecast=forecast)
    idle.register_pool(busy.pool(POOL).registration, 3, 1.0)
    for source, spare in ((busy, idle), (idle, busy), (busy, busy)):
        used = snapshot.clone(spare)
        memory = used.pool(POOL).memory
        copy = snapshot.clone(source, used)
        # Quotas bring columns of their own: only memory with the same parts is taken.
        assert (copy.pool(POOL).memory is memory) == (source is spare)
        assert snapshot.digest(copy) == snapshot.digest(source)
        mirror = snapshot.clone(source)
        for each in (copy, mirror):
            number = each.connect_gateway("three", 33, 40.0)
            epoch = each.pool(POOL).epoch
            each.admit(number, AdmitRequest(POOL, epoch, "x", 0, pack(list(range(40))), tenant="t"), 41.0)
            each.lease(number, POOL, epoch, 2, 42.0)
        assert snapshot.digest(copy) == snapshot.digest(mirror)


def test_a_log_replayed_elsewhere_needs_no_secret() -> None:
    """Otherwise a log for a bug report is worth nothing, or gives the tenants' secret away."""
    core = new_core()
    log = CommandLog(core, 1 << 20)
    live(core)
    (segment,) = log.segments
    data = snapshot.encode(segment.base)
    lines = [encode_entry(entry) for entry in segment.entries()]
    assert not any(b"secret of this test" in line for line in (data, *lines))
    assert snapshot.digest(replay(snapshot.decode(data), map(decode_entry, lines))) == snapshot.digest(core)


def test_results_are_the_same_ones() -> None:
    """Otherwise the state may be right by chance while answers differ."""
    core = new_core()
    log = CommandLog(core, 1 << 20)
    live(core)
    twin = snapshot.clone(log.segments[0].base)
    found = {entry.command: apply(twin, entry) for entry in log.segments[0].entries() if not entry.refused}
    assert found["lease"] == np.flatnonzero(core.pool(POOL).memory.pool.lessee == 1).tolist() or found["lease"]
    assert found["connect_gateway"] == 2


def test_a_log_keeps_within_its_bytes_and_covers_what_it_keeps() -> None:
    """A log that grows takes the service's memory; one that drops too much explains nothing."""
    core = new_core()
    log = CommandLog(core, 1 << 18)
    live(core)
    for turn in range(600):
        table = core.admit(1, request(f"again{turn}", [turn] * 30), 50.0 + turn).table
        tell(core, 1, 50.5 + turn, closed=[table], close_reasons=[CloseReason.CANCELLED])
    assert len(log.segments) == 2
    assert log.end - log.first < 600 < log.end
    assert sum(map(len, (segment.lines for segment in log.segments))) == log.end - log.first
    assert snapshot.digest(replay_segments(log.segments)) == snapshot.digest(core)
    assert snapshot.digest(replay_segments(log.segments[:1])) == snapshot.digest(log.segments[1].base)


def test_a_log_bounds_what_the_garbage_collector_has_to_pass_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise many small journals in a large log show as pauses of the whole service."""
    monkeypatch.setattr(log_module, "_HEAVY_LIMIT", 64)
    core = live(new_core())
    log = CommandLog(core, 1 << 26)
    for turn in range(400):
        core.touch_gateway(1, 60.0 + turn)
        tell(core, 1, 60.5 + turn)
    assert [len(segment.lines) for segment in log.segments] == [128, 800 - log.first - 128]
    assert snapshot.digest(replay_segments(log.segments)) == snapshot.digest(core)


def test_a_log_too_small_for_the_state_ends_and_says_so() -> None:
    """Otherwise it copies the state at every turn, or takes memory that nobody allowed."""
    core = new_core()
    log = CommandLog(core, 1 << 12)
    assert not log.ended
    live(core)
    for turn in range(60):
        core.touch_gateway(1, 60.0 + turn)
    assert "the state takes" in log.ended
    assert (core.log, core.roots, log.segments) == (None, None, [])


def test_a_state_that_cannot_be_copied_ends_the_log_and_not_the_command() -> None:
    """A defect of the flight recorder must not bring the plane down."""
    core = live(new_core())
    log = CommandLog(core, 1 << 20)
    core.pool(POOL).memory.statistics.hit_token_count = object()  # type: ignore[assignment]
    for turn in range(5000):
        core.heartbeat(POOL, 7, 60.0 + turn)
    assert "cannot be copied" in log.ended
    assert core.log is None


@pytest.mark.parametrize("command", ["lease", "admit"])
def test_an_entry_that_does_not_fit_is_reported(command: str) -> None:
    """A replay that shrugs shows a state that never was."""
    core = live(new_core())
    args = {"lease": (1, POOL, 2, 1, 30.0), "admit": (2, request("x", [1]), 30.0)}[command]
    with pytest.raises(CorruptionError, match="accepted, and is refused now"):
        apply(core, Entry(command, args, {}, refused=False))
    with pytest.raises(CorruptionError, match="arguments that it cannot have"):
        apply(core, Entry(command, (), {}, refused=False))
    with pytest.raises(CorruptionError, match="was refused, and is accepted now"):
        apply(core, Entry("touch_gateway", (1, 30.0), {}, refused=True))
    with pytest.raises(CorruptionError, match="not a command"):
        apply(core, Entry("take_events", (), {}, refused=False))


def test_garbage_is_refused_by_its_place() -> None:
    """A damaged file must be an error with a name, never a crash and never a state."""
    source = random.Random(5)
    core = live(new_core())
    log = CommandLog(core, 1 << 20)
    core.admit(1, request("x", [1, 2, 3]), 30.0)
    tell(core, 1, 31.0, tables=[1], token_starts=[41], token_counts=[1], token_ids=[4], written_counts=[41])
    goods = [snapshot.encode(core), *(encode_entry(entry) for entry in log.segments[0].entries())]
    reads: list[Any] = [snapshot.decode, *([decode_entry] * (len(goods) - 1))]
    for good, read in zip(goods, reads, strict=True):
        read(good)
        for _ in range(150):
            bad = bytearray(good)
            for _ in range(source.choice([1, 1, 3])):
                bad[source.randrange(len(bad))] = source.randrange(256)
            cut = bytes(bad[: source.randrange(len(bad))] if source.random() < 0.3 else bad)
            try:
                found = read(cut)
            except CorruptionError:
                continue
            # Another value of the same shape: that is what checksums are for.
            assert isinstance(found, MemoryCore | Entry)
    for bad_bytes in (
        b"",
        b"l\xff\xff\xff\xff\x7f",
        b"l" * 100,
        b"t\x01" * 60,
        b"a\x00\x01\xff\xff\xff\xff\x7f",
        b"o\x01?\x00",
    ):
        with pytest.raises(CorruptionError):
            decode_entry(bad_bytes)


def test_a_core_of_another_version_is_refused() -> None:
    """Fields that are gone or new cannot be guessed."""
    core = live(new_core())
    data = snapshot.encode(core).replace(b"\x0apreemption_count"[1:], b"preemption_cousin"[:16])
    with pytest.raises(CorruptionError, match="fields of PoolStatistics"):
        snapshot.decode(data)


def test_a_value_that_cannot_be_written_is_an_error_at_once() -> None:
    """Otherwise it is found when the log is read, which is too late."""
    with pytest.raises(TypeError, match="InvalidRequestError"):
        encode_entry(Entry("admit", (InvalidRequestError("x"),), {}, refused=False))
