"""Turns scheduled sequences into what one forward pass needs. The only place that does."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from execsvc.choosing import prompt_rows
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
    reported: list[tuple[int, int]]
    """(index into `sequences`, position) where the logits are reported for the prompt's next token."""
    logit_count: int
    """Rows whose logits are needed."""
    sampled_rows: torch.Tensor
    """`[padded]` int64 on the device: the last row of each that samples, the reported rows, padding with row 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """One forward pass, on the host. Sequences with one token come first."""

    sequences: list[Sequence]
    row_ids: Ints
    """`[sequence]`."""
    decode_count: int
    """Leading sequences with exactly one token."""
    owners: Ints
    """`[token]`: index of the sequence."""
    tokens: Ints
    """`[token]`."""
    last_known: npt.NDArray[np.bool_]
    """`[token]`: whether it is the last known token of a sequence with one token."""
    positions: Ints
    """`[token]`."""
    slots: Ints
    """`[token]`: where its keys and values go."""
    context_lens: Ints
    """`[sequence]`: computed tokens after this step."""
    query_starts: Ints
    """`[sequence + 1]`: where each sequence's tokens begin."""
    sampled: list[int]
    """Indexes into `sequences` of those that sample."""
    reported: list[tuple[int, int]]
    """(index into `sequences`, position) where the logits are reported for the prompt's next token."""
    logit_rows: Ints
    """Rows of the tokens whose logits are needed: those that sample, then the reported ones."""


def arrange(rows: SequenceRows, scheduled: list[tuple[Sequence, int]]) -> Arrangement:
    """Returns the arrangement of `scheduled` (sequence, token count) pairs, which the caller has checked."""
    ordered = [pair for pair in scheduled if pair[1] == 1] + [pair for pair in scheduled if pair[1] > 1]
    row_ids = np.array([sequence.row for sequence, _ in ordered], dtype=np.int64)
    counts = np.array([count for _, count in ordered], dtype=np.int64)
    query_starts = np.zeros(len(ordered) + 1, dtype=np.int64)
    np.cumsum(counts, out=query_starts[1:])
    firsts = rows.computed[row_ids]
    context_lens = firsts + counts
    known = rows.known[row_ids]
    owners = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(int(query_starts[-1])) - query_starts[owners] + firsts[owners]
    blocks = rows.block_tables[row_ids[owners], positions // rows.block_size].astype(np.int64)
    sampled = np.flatnonzero(context_lens == known)
    reported = [
        (index, position)
        for index in np.flatnonzero(rows.reports_prompt[row_ids]).tolist()
        for position in prompt_rows(ordered[index][0], int(firsts[index]), ordered[index][1])
    ]
    reported_rows = [int(query_starts[index] - firsts[index]) + position for index, position in reported]
    return Arrangement(
        sequences=[sequence for sequence, _ in ordered],
        row_ids=row_ids,
        decode_count=int((counts == 1).sum()),
        owners=owners,
        tokens=_tokens(rows, ordered, firsts, query_starts),
        last_known=((counts == 1) & (context_lens == known))[owners],
        positions=positions,
        slots=blocks * rows.block_size + positions % rows.block_size,
        context_lens=context_lens,
        query_starts=query_starts,
        sampled=sampled.tolist(),
        reported=reported,
        logit_rows=np.concatenate([query_starts[1:][sampled] - 1, np.array(reported_rows, dtype=np.int64)]),
    )


def build(rows: SequenceRows, scheduled: list[tuple[Sequence, int]], device: torch.device) -> Batch:
    """Returns the batch of `scheduled` (sequence, token count) pairs, which the caller has checked."""
    plan = arrange(rows, scheduled)
    return Batch(
        sequences=plan.sequences,
        decode_count=plan.decode_count,
        token_count=len(plan.tokens),
        tokens=_padded(plan.tokens).to(device),
        positions=_padded(plan.positions).to(device),
        slots=torch.from_numpy(plan.slots).to(device),
        block_tables=rows.block_tables[plan.row_ids],
        context_lens=plan.context_lens,
        query_starts=plan.query_starts,
        sampled=plan.sampled,
        reported=plan.reported,
        logit_count=len(plan.logit_rows),
        sampled_rows=_padded(plan.logit_rows).to(device),
    )


def _padded(values: Ints) -> torch.Tensor:
    """Returns `values` with zeros up to a multiple of ROW_MULTIPLE."""
    padded = np.zeros(round_up(len(values), ROW_MULTIPLE), dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


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
