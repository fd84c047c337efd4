"""What is answered of a token besides its text, and which samples are answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.step import LogprobRow
from protos.gateway.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from gateway.core.sequence import Sequence
    from gateway.detokenize import TokenBytes


def token_logprob(row: LogprobRow, count: int, token_bytes: TokenBytes) -> pb.TokenLogprob:
    """Returns a row of log-probabilities as it is answered, with the `count` most likely tokens."""
    logprob = pb.TokenLogprob(
        token_id=row.token_ids[0],
        text=token_bytes.text([row.token_ids[0]]),
        logprob=row.values[0],
        rank=row.rank,
    )
    for token, value in zip(row.token_ids[1 : count + 1], row.values[1 : count + 1], strict=True):
        logprob.top.add(token_id=token, text=token_bytes.text([token]), logprob=value)
    return logprob


def best_samples(samples: Rows[Sequence], count: int) -> list[int]:
    """Returns the indexes of the `count` samples whose tokens are most likely together, the best first."""
    ranked = sorted(samples, key=lambda sample: (-sample.cumulative_logprob, sample.index))
    return [sample.index for sample in ranked[:count]]
