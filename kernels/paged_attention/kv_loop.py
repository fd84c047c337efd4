"""Triton: the loop over tiles of keys and values, and the softmax that goes with it. All attention kernels share them.

The softmax is computed online, with base-2 exponents: a row keeps the largest score so far, the sum of its weights
relative to it, and the weighted sum of values. Sources: Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018; Dao et al., "FlashAttention", 2022.
"""

import triton
import triton.language as tl


@triton.jit
def _bounded(products, score_factor, cap_log2, SOFT_CAP: tl.constexpr):
    """Returns scores as base-2 exponents.

    tanh(x) = 1 - 2 / (1 + e^2x): an infinite e^2x gives 1, where the quotient of two infinities would give NaN.
    `score_factor` holds 2 log2(e) / cap in that case.
    """
    scores = products * score_factor
    if SOFT_CAP:
        scores = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
    return scores


@triton.jit
def _halves(pairs, KIND: tl.constexpr):
    """Returns the first and the second of each pair of 8-bit numbers, as KIND."""
    first = (pairs & 255).to(tl.int8).to(KIND, bitcast=True)
    second = (pairs >> 8).to(tl.int8).to(KIND, bitcast=True)
    return first, second


@triton.jit
def attend_tiles(
    q,
    running_max,
    running_sum,
    acc,
    k_ptr,
    v_ptr,
    table_ptr,
    first_tile,
    last_tile,
    start,
    end,
    row_floor,
    row_ceiling,
    score_factor,
    cap_log2,
    stride_k_block: tl.int64,
    stride_k_slot,
    stride_v_block: tl.int64,
    stride_v_slot,
    SOFT_CAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    FLOOR: tl.constexpr,
    CEILING: tl.constexpr,
    PAIRED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attends the rows of `q` to tiles `first_tile <= tile < last_tile` of one sequence's context.

    `k_ptr` and `v_ptr` point at the kv head, `table_ptr` at the sequence's block table. BOUNDED: only positions
    `start <= position < end` exist, nothing else is loaded. FLOOR, CEILING: a row sees positions from its `row_floor`,
    up to and with its `row_ceiling`. The blocks of a tile are looked up one tile ahead, so that the loads of keys and
    values wait for no other load and can be kept in flight.

    PAIRED: values are of 8 bits, and loaded and multiplied as pairs of neighbours. Where few rows are multiplied, the
    compiler lays values out in shared memory by 8 elements, so that single ones would be copied 8 bytes at a time.

    Returns:
        running_max, running_sum, acc.
    """
    tile_positions = tl.arange(0, TILE)
    dims = tl.arange(0, DIMS)
    dim_mask = dims < HEAD_DIM
    # What is said of values holds for pairs of them, too, if there are pairs.
    value_count: tl.constexpr = DIMS // 2 if PAIRED else DIMS
    values = tl.arange(0, value_count)
    value_mask = values < (HEAD_DIM // 2 if PAIRED else HEAD_DIM)
    if PAIRED:
        v_ptr = v_ptr.to(tl.pointer_type(tl.int16))
        stride_v_block = stride_v_block // 2
        stride_v_slot = stride_v_slot // 2
        even, odd = tl.split(tl.reshape(acc, (acc.shape[0], value_count, 2)))
    positions = first_tile * TILE + tile_positions
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=(positions >= start) & (positions < end), other=0)
    for tile in range(first_tile, last_tile):
        positions = tile * TILE + tile_positions
        slots = positions % BLOCK_SIZE
        wide_blocks = blocks.to(tl.int64)
        k_ptrs = k_ptr + (wide_blocks * stride_k_block + slots * stride_k_slot)[None, :] + dims[:, None]
        v_ptrs = v_ptr + (wide_blocks * stride_v_block + slots * stride_v_slot)[:, None] + values[None, :]
        seen = (positions >= start) & (positions < end)
        if BOUNDED:
            k = tl.load(k_ptrs, mask=seen[None, :] & dim_mask[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=seen[:, None] & value_mask[None, :], other=0.0)
        elif HEAD_DIM != DIMS:
            k = tl.load(k_ptrs, mask=dim_mask[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=value_mask[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        ahead = positions + TILE
        blocks = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=(ahead >= start) & (ahead < end), other=0)
        products = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        scores = _bounded(products, score_factor, cap_log2, SOFT_CAP)
        if BOUNDED:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        if FLOOR:
            scores = tl.where(positions[None, :] >= row_floor[:, None], scores, float("-inf"))
        if CEILING:
            scores = tl.where(positions[None, :] <= row_ceiling[:, None], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # Nothing seen yet: -inf minus -inf would be NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        weights = weights.to(q.dtype)
        if PAIRED:
            low, high = _halves(v, k_ptr.dtype.element_ty)
            even = tl.dot(weights, low.to(q.dtype), even * rescale[:, None], input_precision="ieee")
            odd = tl.dot(weights, high.to(q.dtype), odd * rescale[:, None], input_precision="ieee")
        else:
            acc = tl.dot(weights, v.to(q.dtype), acc * rescale[:, None], input_precision="ieee")
        running_max = new_max
    if PAIRED:
        acc = tl.interleave(even, odd)
    return running_max, running_sum, acc


@triton.jit
def _absorb_sinks(running_max, running_sum, acc, sinks):
    """Lets one score more, without a value, take part in each row's softmax; `sinks` are base-2 exponents.

    Returns:
        running_max, running_sum, acc.
    """
    new_max = tl.maximum(running_max, sinks)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(running_max - safe_max)
    return new_max, running_sum * rescale + tl.exp2(sinks - safe_max), acc * rescale[:, None]


@triton.jit
def store_rows(
    running_max,
    running_sum,
    acc,
    v_scale,
    row_mask,
    sink_ptrs,
    out_row_ptrs,
    lse_ptrs,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Finishes rows and stores them, each at its pointer, with the natural logarithm of its sum of exponentials."""
    if HAS_SINKS:
        # log2(e): exponents are of base 2.
        sinks = tl.load(sink_ptrs, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        running_max, running_sum, acc = _absorb_sinks(running_max, running_sum, acc, sinks)
    # A sum of zero is an empty row. NaN is not: what was read wrongly must be seen, not turned into zeros.
    empty = running_sum == 0.0
    divisor = tl.where(empty, 1.0, running_sum)
    out = acc * (v_scale / divisor)[:, None]
    dims = tl.arange(0, DIMS)
    tl.store(
        out_row_ptrs[:, None] + dims[None, :],
        out.to(out_row_ptrs.dtype.element_ty),
        mask=row_mask[:, None] & (dims < HEAD_DIM)[None, :],
    )
    if HAS_LSE:
        # log(2), likewise.
        lse = (tl.where(empty, float("-inf"), running_max) + tl.log2(divisor)) * 0.6931471805599453
        tl.store(lse_ptrs, lse, mask=row_mask)
