"""`quire top` puts together what a watched pool tells."""

from __future__ import annotations

from rich.console import Console

from protos.memsvc.v1 import admin_pb2, memsvc_pb2
from quire.cli.top import WatchedPool, _draw


def _told(
    *sequences: tuple[int, int], gone: tuple[int, ...] = (), complete: bool = True
) -> admin_pb2.WatchPoolResponse:
    """Returns a message about (ordinal, token count) pairs."""
    response = admin_pb2.WatchPoolResponse(gone_ordinals=gone)
    for ordinal, tokens in sequences:
        one = response.sequences.add(sequence_id=f"s{ordinal}/0", ordinal=ordinal, token_count=tokens)
        one.age.FromNanoseconds(10**9)
    if complete:
        spec = memsvc_pb2.PoolSpec(block_count=11, block_size=16)
        response.pool.CopyFrom(admin_pb2.Pool(pool_id="p", spec=spec, free_block_count=10, sequence_count=1))
    return response


def test_messages_of_one_moment_count_once_all_have_come() -> None:
    """Half a moment would show sequences that are not in the pool's figures."""
    watched = WatchedPool()
    assert not watched.apply(_told((1, 16), complete=False), 10.0)
    assert watched.apply(_told((2, 32)), 10.0)
    assert [one.sequence_id for one in watched.sequences(12.5)] == ["s1/0", "s2/0"]
    assert [one.age.ToNanoseconds() for one in watched.sequences(12.5)] == [3_500_000_000] * 2


def test_tokens_a_second_are_those_that_sequences_gained() -> None:
    """A long prompt that has just come was not generated."""
    watched = WatchedPool()
    watched.apply(_told((1, 16), (2, 100)), 10.0)
    assert watched.token_rate == 0.0
    watched.apply(_told((1, 48), (3, 5000), gone=(2,)), 12.0)
    assert watched.token_rate == 16.0
    assert [one.ordinal for one in watched.sequences(12.0)] == [1, 3]


def test_more_sequences_than_lines_are_counted() -> None:
    """A picture longer than the terminal would scroll away."""
    watched = WatchedPool()
    watched.apply(_told(*((ordinal, 16) for ordinal in range(30))), 1.0)
    console = Console(width=100, height=20, record=True, force_terminal=False)
    console.print(_draw(watched, 100, 20, 1.0))
    text = console.export_text()
    assert "pool p" in text
    assert "s10/0" in text
    assert "and 19 more" in text
