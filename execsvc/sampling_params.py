"""SamplingParams and Logprobs between the wire and the engine."""

from __future__ import annotations

from collections.abc import Container

from execsvc.choosing import LogprobRows
from execsvc.sampler import SamplingSpec
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import InvalidRequestError


def check_columns(message: pb.SamplingParams) -> None:
    """Raises InvalidRequestError if a column is malformed."""
    columns.check(message.withheld_tokens, "withheld_tokens")
    columns.check(message.bias_tokens, "bias_tokens")
    columns.check(message.bias_values, "bias_values", row_count=len(message.bias_tokens) // columns.U32_BYTES)


def sampling_spec(message: pb.SamplingParams, vocab_size: int) -> SamplingSpec:
    """Returns the parameters.

    Raises:
        InvalidRequestError: one is out of range.
    """
    withheld = _tokens(message.withheld_tokens, "withheld_tokens", vocab_size)
    bias: tuple[tuple[int, float], ...] = ()
    if message.bias_tokens:
        biased = _tokens(message.bias_tokens, "bias_tokens", vocab_size)
        values = columns.unpack_floats(message.bias_values, "bias_values", row_count=len(biased))
        bias = tuple(zip(biased, values, strict=True))
    return SamplingSpec(
        message.temperature,
        message.top_k,
        message.top_p,
        message.min_p,
        message.seed,
        withheld,
        message.withheld_until,
        typical_p=message.typical_p or 1.0,
        bias=bias,
        repetition_penalty=message.repetition_penalty or 1.0,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        prompt_token_count=message.prompt_token_count,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        grammar=message.grammar,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def _tokens(column: bytes, field: str, vocab_size: int) -> tuple[int, ...]:
    """Returns a column of tokens; raises InvalidRequestError if one is outside the vocabulary."""
    tokens = tuple(columns.unpack_list(column, field))
    if tokens and max(tokens) >= vocab_size:
        message = f"{field}: {max(tokens)} is not below the vocabulary, {vocab_size}"
        raise InvalidRequestError(message, field=field)
    return tokens


def report_logprobs(rows: LogprobRows, failed: Container[int], result: pb.StepResult) -> None:
    """Puts log-probabilities into a result, but for those of tables that failed."""
    if not rows.tables:
        return
    kept = LogprobRows()
    start = 0
    for row, table in enumerate(rows.tables):
        end = start + rows.counts[row]
        if table not in failed:
            kept.tables.append(table)
            kept.positions.append(rows.positions[row])
            kept.ranks.append(rows.ranks[row])
            kept.counts.append(rows.counts[row])
            kept.token_ids += rows.token_ids[start:end]
            kept.values += rows.values[start:end]
        start = end
    result.logprobs.tables = columns.pack(kept.tables)
    result.logprobs.positions = columns.pack(kept.positions)
    result.logprobs.ranks = columns.pack(kept.ranks)
    result.logprobs.counts = columns.pack(kept.counts)
    result.logprobs.token_ids = columns.pack(kept.token_ids)
    result.logprobs.values = columns.pack_floats(kept.values)
