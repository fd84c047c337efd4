"""The steps and the streams that `quire bench scheduler` times are real ones."""

from __future__ import annotations

from gateway.bench.bare_server import BareStack
from gateway.bench.front import Front, Window
from gateway.bench.null_stack import NullStack
from gateway.bench.scheduler_report import FEW, FIGURES, MANY, PARTS, build_document
from gateway.bench.scheduling import LoopSteps
from memsvc.core import invariants
from tests.unit.gateway.bench.memories import connected


async def test_in_every_step_as_many_sequences_grow_as_fill_a_block_and_every_one_has_a_token() -> None:
    """Otherwise the median is that of a step in which little happens."""
    memory, pool = await connected()
    loop = LoopSteps(memory, pool, 64)
    await loop.start()
    memory.entries.clear()
    samples = await loop.steps(32)
    assert {(len(entry.appended), len(entry.tables)) for entry in memory.entries} == {(3 * 4, 4)}
    assert {len(values) for values in samples.values()} == {32}
    invariants.check(memory.core)


def test_the_report_has_every_figure_with_its_note_and_the_peer_beside_it() -> None:
    """A figure without its meaning, or a ratio upside down, misleads whoever decides by it."""
    names = ("schedule_and_update", "schedule", "update", "stops", "journal", "encoding")
    ours = {f"{name}_{count}": [1e-3, 2e-3] for name in names for count in (FEW, MANY)}
    theirs = {name: [value * 3 for value in values] for name, values in ours.items()}
    cpu = {"gateway": 0.5, "memsvc": 0.1, "execsvc": 0.1, "clients": 0.4}
    window = Window(seconds=2.0, message_count=10_000, token_count=20_480, cpu_seconds=cpu)
    document = build_document(ours, theirs, [window], [window], [window], environment={}, peer={"name": "vllm"})
    assert document["token_messages_per_core_s"] == 20_000
    assert document["decode_step_overhead_us"] == 25_000
    assert document["ratios"] == {"schedule_and_update_256_us": 3.0, "schedule_and_update_2048_us": 3.0}
    assert set(document["figures"]) == set(FIGURES)
    assert {name.removesuffix("_us") for name in document["parts"]} == set(PARTS)


async def test_three_services_bring_every_stream_its_tokens() -> None:
    """A stream that is left out makes the others look fast."""
    front = Front(8, NullStack(8))
    try:
        await front.start()
        window = await front.count(0.2)
    finally:
        await front.close()
    assert window.token_count >= window.message_count > 8
    assert set(window.cpu_seconds) == {"memsvc", "execsvc", "gateway", "clients"}


async def test_a_bare_server_sends_every_stream_one_token_a_message() -> None:
    """What gRPC costs by itself is what the gateway is compared with."""
    front = Front(4, BareStack(0.01))
    try:
        await front.start()
        window = await front.count(0.2)
    finally:
        await front.close()
    assert window.token_count == window.message_count > 4
