"""Triton: a write a lane, a place a program, a block of places a program."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_same_device, check_shape
from kernels.step_state.tensors import PARAMETERS, Resident, Staged

_WRITES = 256
_PLACES = 256
_CHUNK = 1024
"""Table entries that one program copies."""


@triton.jit(do_not_specialize=["count"])
def _apply_writes(state_ptr, offset_ptr, value_ptr, count, WRITES: tl.constexpr):
    """Grid (group of writes,)."""
    writes = tl.program_id(0) * WRITES + tl.arange(0, WRITES)
    mask = writes < count
    offsets = tl.load(offset_ptr + writes, mask=mask, other=0)
    values = tl.load(value_ptr + writes, mask=mask, other=0)
    tl.store(state_ptr + offsets, values, mask=mask)


@triton.jit
def _stage_decode(
    table_ptr,
    computed_ptr,
    token_ptr,
    param_ptr,
    row_ptr,
    out_token_ptr,
    out_position_ptr,
    out_slot_ptr,
    out_len_ptr,
    out_table_ptr,
    out_param_ptr,
    stride_table: tl.int64,
    stride_param: tl.int64,
    stride_out_table: tl.int64,
    stride_out_param: tl.int64,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARAM_COUNT: tl.constexpr,
    PARAM_LANES: tl.constexpr,
):
    """Grid (place, chunk of the table)."""
    place = tl.program_id(0)
    chunk = tl.program_id(1)
    given = tl.load(row_ptr + place)
    used = given >= 0
    # Padding reads row 0 and takes nothing of it.
    row = tl.maximum(given, 0).to(tl.int64)
    position = tl.where(used, tl.load(computed_ptr + row), 0)
    length = tl.where(used, position + 1, 0)
    if chunk == 0:
        token = tl.where(used, tl.load(token_ptr + row), 0)
        block = tl.load(table_ptr + row * stride_table + position // BLOCK_SIZE).to(tl.int64)
        slot = tl.where(used, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        tl.store(out_token_ptr + place, token.to(tl.int64))
        tl.store(out_position_ptr + place, position.to(tl.int64))
        tl.store(out_slot_ptr + place, slot)
        tl.store(out_len_ptr + place, length)
        lanes = tl.arange(0, PARAM_LANES)
        lane_mask = lanes < PARAM_COUNT
        params = tl.load(param_ptr + lanes * stride_param + row, mask=lane_mask, other=0)
        tl.store(out_param_ptr + lanes * stride_out_param + place, tl.where(used, params, 0), mask=lane_mask)
    entries = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = entries < (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    blocks = tl.load(table_ptr + row * stride_table + entries, mask=mask, other=0)
    tl.store(out_table_ptr + place * stride_out_table + entries, blocks, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _advance(computed_ptr, token_ptr, row_ptr, len_ptr, sampled_ptr, place_ptr, count, PLACES: tl.constexpr):
    """Grid (group of places,)."""
    places = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    rows = tl.load(row_ptr + places, mask=places < count, other=-1)
    used = rows >= 0
    lens = tl.load(len_ptr + places, mask=used, other=0)
    tl.store(computed_ptr + rows, lens, mask=used)
    samples = tl.load(place_ptr + places, mask=used, other=-1)
    sampling = samples >= 0
    tokens = tl.load(sampled_ptr + samples, mask=sampling, other=0)
    tl.store(token_ptr + rows, tl.maximum(tokens, 0), mask=sampling)


def apply_writes(state: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> None:
    """See `reference.apply_writes`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("state", state, (None,))
    check_shape("values", values, offsets.shape)
    for name, tensor in (("state", state), ("offsets", offsets), ("values", values)):
        check_dtype(name, tensor, (torch.int32,))
    check_same_device(state=state, offsets=offsets, values=values)
    count = offsets.shape[0]
    if count:
        _apply_writes[(triton.cdiv(count, _WRITES),)](state, offsets, values, count, WRITES=_WRITES, num_warps=4)


def stage_decode(resident: Resident, rows: torch.Tensor, staged: Staged, block_size: int) -> None:
    """See `reference.stage_decode`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    place_count, block_max = rows.shape[0], resident.tables.shape[1]
    check_dtype("rows", rows, (torch.int32,))
    check_shape("staged.tables", staged.tables, (place_count, block_max))
    check_shape("staged.params", staged.params, (len(PARAMETERS), place_count))
    check_same_device(state=resident.state, rows=rows, staged=staged.tables)
    if not place_count:
        return
    chunk = min(_CHUNK, triton.next_power_of_2(block_max))
    _stage_decode[(place_count, triton.cdiv(block_max, chunk))](
        resident.tables, resident.computed, resident.tokens, resident.params, rows,
        staged.tokens, staged.positions, staged.slots, staged.lens, staged.tables, staged.params,
        resident.tables.stride(0), resident.params.stride(0), staged.tables.stride(0), staged.params.stride(0),
        BLOCK_SIZE=block_size, CHUNK=chunk, PARAM_COUNT=len(PARAMETERS),
        PARAM_LANES=triton.next_power_of_2(len(PARAMETERS)), num_warps=4,
    )  # fmt: skip


def advance(
    resident: Resident, rows: torch.Tensor, lens: torch.Tensor, sampled: torch.Tensor, places: torch.Tensor
) -> None:
    """See `reference.advance`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    count = rows.shape[0]
    for name, tensor in (("rows", rows), ("lens", lens), ("places", places)):
        check_shape(name, tensor, (count,))
        check_dtype(name, tensor, (torch.int32,))
    check_dtype("sampled", sampled, (torch.int32,))
    check_same_device(state=resident.state, rows=rows, lens=lens, sampled=sampled, places=places)
    if count:
        _advance[(triton.cdiv(count, _PLACES),)](
            resident.computed, resident.tokens, rows, lens, sampled, places, count, PLACES=_PLACES, num_warps=4
        )
