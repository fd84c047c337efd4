"""Triton: penalties and bias, for the tokens of a row that have any, and the counts that they are made of.

A row's entries are the distinct tokens that its prompt and its output have, or that have a bias: a few hundred numbers
instead of a column for each token of the vocabulary.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.layout import ACTIVATION_DTYPES

_ENTRIES = 256
"""Entries that one program works on at a time."""
ONLY_BIAS = -1
"""Count of a token that neither the prompt nor the output has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entries:
    """Tokens with penalties or a bias, a row each; all on the device."""

    tokens: torch.Tensor
    """`[row, entry]` int32, distinct in a row."""
    counts: torch.Tensor
    """`[row, entry]` int32: how often the token was produced; 0 for one of the prompt alone, ONLY_BIAS for neither."""
    bias: torch.Tensor
    """`[row, entry]` float32: added to the logit; -inf withholds the token."""
    lengths: torch.Tensor
    """`[row]` int32: entries in use; what is behind them is never read."""
    repetition: torch.Tensor
    """`[row]` float32: logits of tokens that were there are divided by it if positive, else multiplied; 1: none."""
    presence: torch.Tensor
    """`[row]` float32: taken off if the token was produced; 0: none."""
    frequency: torch.Tensor
    """`[row]` float32: taken off for each time that it was; 0: none."""

    @classmethod
    def allocate(cls, row_count: int, entry_max: int, device: torch.device) -> "Entries":
        """Returns rows without entries and without penalties, with room for `entry_max` entries each."""
        whole = torch.zeros(2, row_count, entry_max, dtype=torch.int32, device=device)
        bias = torch.zeros(row_count, entry_max, device=device)
        lengths = torch.zeros(row_count, dtype=torch.int32, device=device)
        numbers = torch.zeros(3, row_count, device=device)
        numbers[0] = 1.0
        return cls(whole[0], whole[1], bias, lengths, numbers[0], numbers[1], numbers[2])

    def check(self, row_count: int) -> None:
        """Checks shapes, types, strides and devices.

        Raises:
            ValueError: one does not fit.
        """
        check_shape("entries.tokens", self.tokens, (row_count, None))
        for name in ("tokens", "counts", "bias"):
            tensor = getattr(self, name)
            check_shape(f"entries.{name}", tensor, self.tokens.shape)
            check_dtype(f"entries.{name}", tensor, (torch.float32 if name == "bias" else torch.int32,))
            if tensor.stride() != self.tokens.stride():
                message = f"entries.{name}: strides of entries.tokens expected, found {tensor.stride()}"
                raise ValueError(message)
        check_last_axis_dense("entries.tokens", self.tokens)
        for name in ("lengths", "repetition", "presence", "frequency"):
            tensor = getattr(self, name)
            check_shape(f"entries.{name}", tensor, (row_count,))
            check_dtype(f"entries.{name}", tensor, (torch.int32 if name == "lengths" else torch.float32,))
            check_last_axis_dense(f"entries.{name}", tensor)
        check_same_device(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


@triton.jit
def _adjust(
    logits_ptr,
    tokens_ptr,
    counts_ptr,
    bias_ptr,
    length_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    stride_logits: tl.int64,
    stride_entries: tl.int64,
    vocabulary,
    ENTRIES: tl.constexpr,
):
    """Grid (row, group of ENTRIES entries)."""
    row = tl.program_id(0)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    used = entries < tl.load(length_ptr + row)
    at = row * stride_entries + entries
    tokens = tl.load(tokens_ptr + at, mask=used, other=-1)
    counts = tl.load(counts_ptr + at, mask=used, other=-1)
    used = used & (tokens >= 0) & (tokens < vocabulary)
    targets = logits_ptr + row * stride_logits + tokens
    logits = tl.load(targets, mask=used, other=0.0).to(tl.float32)
    repetition = tl.load(repetition_ptr + row)
    repeated = tl.where(logits > 0.0, logits / repetition, logits * repetition)
    produced = tl.maximum(counts, 0)
    taken = tl.load(frequency_ptr + row) * produced + tl.where(produced > 0, tl.load(presence_ptr + row), 0.0)
    logits = tl.where(counts >= 0, repeated, logits) - taken + tl.load(bias_ptr + at, mask=used, other=0.0)
    tl.store(targets, logits.to(logits_ptr.dtype.element_ty), mask=used)


@triton.jit
def _count(
    sampled_ptr,
    tokens_ptr,
    counts_ptr,
    bias_ptr,
    length_ptr,
    stride_entries: tl.int64,
    entry_max,
    ENTRIES: tl.constexpr,
):
    """Grid (row,): one more of the token that was sampled, in a new entry if it has none."""
    row = tl.program_id(0)
    token = tl.load(sampled_ptr + row)
    length = tl.load(length_ptr + row)
    place = tl.full([], -1, tl.int32)
    for start in range(0, length, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        known = tl.load(tokens_ptr + row * stride_entries + entries, mask=entries < length, other=-1)
        place = tl.maximum(place, tl.max(tl.where((known == token) & (entries < length), entries, -1), 0))
    new = (place < 0) & (length < entry_max)
    if token >= 0:
        if new:
            at = row * stride_entries + length
            tl.store(tokens_ptr + at, token)
            tl.store(counts_ptr + at, 1)
            tl.store(bias_ptr + at, 0.0)
            tl.store(length_ptr + row, length + 1)
        if place >= 0:
            at = row * stride_entries + place
            tl.store(counts_ptr + at, tl.maximum(tl.load(counts_ptr + at), 0) + 1)


def adjust_logits(logits: torch.Tensor, entries: Entries) -> None:
    """Applies penalties and bias before a choice. Writes `logits`, at the entries' tokens only.

    Args:
        logits: `[row, vocabulary]`, dense in the last axis; float32, bfloat16 or float16.
        entries: for the same rows. Tokens outside the vocabulary are skipped.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.

    Complexity: reads and writes one logit for each entry in use; no pass over the logits.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, ACTIVATION_DTYPES)
    check_last_axis_dense("logits", logits)
    row_count, vocabulary = logits.shape
    entries.check(row_count)
    check_same_device(logits=logits, entries=entries.tokens)
    entry_max = entries.tokens.shape[1]
    if row_count == 0 or entry_max == 0:
        return
    _adjust[(row_count, triton.cdiv(entry_max, _ENTRIES))](
        logits, entries.tokens, entries.counts, entries.bias, entries.lengths, entries.repetition, entries.presence,
        entries.frequency, logits.stride(0), entries.tokens.stride(0), vocabulary, ENTRIES=_ENTRIES, num_warps=4,
    )  # fmt: skip


def count_tokens(entries: Entries, sampled: torch.Tensor) -> None:
    """Counts the tokens that were chosen, for the penalties of the next step. Writes `entries`.

    Args:
        entries: a row for each token. A row that is full takes no new token.
        sampled: `[row]` int32; -1: none.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    check_shape("sampled", sampled, (None,))
    check_dtype("sampled", sampled, (torch.int32,))
    check_last_axis_dense("sampled", sampled)
    entries.check(sampled.shape[0])
    check_same_device(sampled=sampled, entries=entries.tokens)
    if sampled.shape[0] == 0:
        return
    _count[(sampled.shape[0],)](
        sampled, entries.tokens, entries.counts, entries.bias, entries.lengths, entries.tokens.stride(0),
        entries.tokens.shape[1], ENTRIES=_ENTRIES, num_warps=4,
    )  # fmt: skip
