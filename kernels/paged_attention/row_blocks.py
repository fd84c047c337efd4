"""Triton: which sequence a block of rows belongs to, where a row is one query head of a kv head at one token."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(starts_ptr, sequence_count, row_block, origin, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Returns the sequence that a row block belongs to, and the sequence's first row block.

    The blocks of sequence s begin at number floor(rows before s / ROWS) + s. That leaves room for ceil(rows of s /
    ROWS) of them whatever the lengths, and can be computed for any s alone: so it can be searched.
    """
    low = 0
    high = sequence_count - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = (tl.load(starts_ptr + middle) - origin) * GROUP // ROWS + middle
        if first <= row_block:
            low = middle
        else:
            high = middle - 1
    return low, (tl.load(starts_ptr + low) - origin) * GROUP // ROWS + low
