"""Turns scheduled sequences into what one forward pass needs. The only place that does."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from execsvc.sequences import Sequence, SequenceRows
from quire.units import round_up

ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this: matrix libraries switch to other code, with other rounding, below it."""

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. Sequences with one token come first."""

    sequences: list[Sequence]
    decode_count: int
    """Leading sequences with exactly one token."""
    token_count: int
    """Tokens to compute; rows beyond are padding."""
    tokens: torch.Tensor
    """`[padded row]` int64 on the device; padding is 0."""
    positions: torch.Tensor
    """`[padded row]` int64 on the device; padding is 0."""
    slots: torch.Tensor
    """`[token]` int64 on the device: where each token's keys and values go."""
    block_tables: npt.NDArray[np.int32]
    """`[sequence, block_max]`, a row each; entries past a sequence's last block are garbage."""
    context_lens: Ints
    """`[sequence]`: computed tokens after this step."""
    query_starts: Ints
    """`[sequence + 1]`: where each sequence's rows begin."""
    sampled: list[int]
    """Indexes into `sequences` of those that sample."""
    sampled_rows: torch.Tensor
    """`[padded]` int64 on the device: the last row of each that samples, padded with row 0."""


def build(rows: SequenceRows, scheduled: list[tuple[Sequence, int]], device: torch.device) -> Batch:
    """Returns the batch of `scheduled` (sequence, token count) pairs, which the caller has checked."""
    ordered = [pair for pair in scheduled if pair[1] == 1] + [pair for pair in scheduled if pair[1] > 1]
    sequences = [sequence for sequence, _ in ordered]
    row_ids = np.array([sequence.row for sequence in sequences], dtype=np.int64)
    counts = np.array([count for _, count in ordered], dtype=np.int64)
    query_starts = np.zeros(len(ordered) + 1, dtype=np.int64)
    np.cumsum(counts, out=query_starts[1:])
    token_count = int(query_starts[-1])
    firsts = rows.computed[row_ids]
    context_lens = firsts + counts
    owners = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(token_count) - query_starts[owners] + firsts[owners]
    padded_count = round_up(token_count, ROW_MULTIPLE)
    tokens = np.zeros(padded_count, dtype=np.int64)
    tokens[:token_count] = _tokens(rows, ordered, firsts, query_starts)
    tables = rows.block_tables[row_ids]
    blocks = tables[owners, positions // rows.block_size].astype(np.int64)
    samples = context_lens == rows.known[row_ids]
    sampled = np.flatnonzero(samples)
    sampled_rows = np.zeros(round_up(len(sampled), ROW_MULTIPLE), dtype=np.int64)
    sampled_rows[: len(sampled)] = query_starts[1:][sampled] - 1
    return Batch(
        sequences=sequences,
        decode_count=int((counts == 1).sum()),
        token_count=token_count,
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(np.pad(positions, (0, padded_count - token_count))).to(device),
        slots=torch.from_numpy(blocks * rows.block_size + positions % rows.block_size).to(device),
        block_tables=tables,
        context_lens=context_lens,
        query_starts=query_starts,
        sampled=sampled.tolist(),
        sampled_rows=torch.from_numpy(sampled_rows).to(device),
    )


def _tokens(rows: SequenceRows, ordered: list[tuple[Sequence, int]], firsts: Ints, query_starts: Ints) -> Ints:
    """Returns the tokens to compute, sequence after sequence."""
    tokens = np.empty(int(query_starts[-1]), dtype=np.int64)
    for index, (sequence, count) in enumerate(ordered):
        first, start = int(firsts[index]), int(query_starts[index])
        if count == 1 and first + 1 == rows.known[sequence.row]:
            tokens[start] = rows.last_token[sequence.row]
        else:
            tokens[start : start + count] = sequence.tokens[first : first + count]
    return tokens
