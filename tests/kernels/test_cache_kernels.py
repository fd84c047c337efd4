"""Writing to the cache, copying and moving blocks: bit for bit, in every type that a cache may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.block_copy import reference as copy_reference
from kernels.block_swap import reference as swap_reference
from kernels.kv_write import reference as write_reference
from kernels.layout import KV_DTYPES

BLOCKS, LAYERS, HEADS, SLOTS, DIM = 6, 2, 3, 16, 8


@pytest.fixture(params=KV_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def kv_dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """Every type that a cache may have; float8 where the device has it."""
    found: torch.dtype = request.param
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    if old and found.itemsize == 1:
        pytest.skip("this device has no float8")
    return found


def _cache(dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns `[block, layer, 2, kv_head, slot, dim]` with content that differs from place to place."""
    shape = (BLOCKS, LAYERS, 2, HEADS, SLOTS, DIM)
    count = torch.arange(BLOCKS * LAYERS * 2 * HEADS * SLOTS * DIM, dtype=torch.int64)
    return (count * 7919 % 251 - 125).float().div(4).reshape(shape).to(dtype).to(device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def _rows(token_count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, token_count, HEADS, DIM, generator=generator).mul(3).to(dtype)
    return key, value


@pytest.mark.parametrize("token_count", [0, 17])
def test_kv_write_equals_the_reference(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, kv_dtype: torch.dtype, token_count: int
) -> None:
    """A token's key must land in its slot and nowhere else; a negative slot writes nothing."""
    slots = torch.randperm(95, generator=torch.Generator().manual_seed(2))[:token_count] + 1
    if token_count > 1:
        slots[1] = -1
    key, value = _rows(token_count, float_dtype)
    expected, found = _cache(kv_dtype), _cache(kv_dtype, device)
    write_reference.kv_write(key, value, expected[:, 1, 0], expected[:, 1, 1], slots, 0.5, 3.0)
    kernels.kv_write(key.to(device), value.to(device), found[:, 1, 0], found[:, 1, 1], slots.to(device), 0.5, 3.0)
    assert torch.equal(_bits(found), _bits(expected))


def test_kv_write_takes_strided_rows_and_a_cache_with_tokens_before_heads(kernels: Any, device: torch.device) -> None:
    """Keys and values are slices of one fused projection; a cache may lie `[block, slot, head, dim]`."""
    fused = torch.randn(5, 4, HEADS, DIM)
    slots = torch.tensor([16, 40, 41, 95, 33])
    base = torch.zeros(BLOCKS, SLOTS, 2, HEADS, DIM)
    expected, found = base.clone().transpose(1, 3), base.clone().to(device).transpose(1, 3)
    write_reference.kv_write(fused[:, 1], fused[:, 2], expected[:, :, 0], expected[:, :, 1], slots)
    moved = fused.to(device)
    kernels.kv_write(moved[:, 1], moved[:, 2], found[:, :, 0], found[:, :, 1], slots.to(device))
    assert torch.equal(found.cpu(), expected)


def test_float8_saturates_and_keeps_nan(kernels: Any, device: torch.device) -> None:
    """An outlier must become the largest number and not NaN, which would spread; NaN must stay to be seen."""
    cache = torch.zeros(2, 1, SLOTS, DIM, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    values = torch.tensor([1e9, -1e9, float("inf"), -float("inf"), float("nan"), 448.0, 460.0, -3.0]).view(1, 1, 8)
    kernels.kv_write(values.to(device), values.to(device), cache, cache.clone(), torch.tensor([17], device=device))
    found = cache[1, 0, 1].float().cpu()
    assert found[:4].tolist() == [448.0, -448.0, 448.0, -448.0]
    assert found[4].isnan()
    assert found[5:].tolist() == [448.0, 448.0, -3.0]


def test_a_block_far_in_a_large_cache_is_reached(kernels: Any, device: torch.device) -> None:
    """A cache has more than 2^31 elements: an offset in 32 bits would wrap, and write into a stranger's block."""
    stride = 2**29 + 64
    # Memory that nobody touches but for two blocks does not exist.
    whole = torch.empty(5 * stride + 2 * SLOTS * DIM, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    shape, strides = (6, 1, SLOTS, DIM), (stride, SLOTS * DIM, DIM, 1)
    keys, values = whole.as_strided(shape, strides), whole.as_strided(shape, strides, SLOTS * DIM)
    key = torch.ones(1, 1, DIM, device=device)
    kernels.kv_write(key, 2 * key, keys, values, torch.tensor([5 * SLOTS], device=device))
    assert keys[5, 0, 0].float().tolist() == [1.0] * DIM
    assert values[5, 0, 0].float().tolist() == [2.0] * DIM


@pytest.mark.parametrize(("float_dtype", "rotary_dim"), [(torch.float32, 4), (torch.float16, 12), (torch.bfloat16, 16)])
def test_rotate_and_write_equals_the_reference(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, kv_dtype: torch.dtype, rotary_dim: int
) -> None:
    """Fused, it must do what the two steps do: turn queries and keys, leave values, write both, skip padding."""
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(5, 4 + 2 * 2, 16, generator=generator).to(float_dtype)
    angles = torch.rand(50, rotary_dim // 2, generator=generator) * 6
    positions = torch.tensor([49, 0, 3, 3, 17])
    slots = torch.tensor([31, 95, -1, 40, 16])
    cache = torch.zeros(BLOCKS, 2, 2, SLOTS, 16).to(kv_dtype)
    expected, found = cache.clone(), cache.clone().to(device)
    queries = write_reference.rotate_and_write(
        heads, angles.cos(), angles.sin(), positions, expected[:, 0], expected[:, 1], slots, 0.25, 2.0
    )
    mine = heads.clone().to(device)
    returned = kernels.rotate_and_write(
        mine, angles.cos().to(device), angles.sin().to(device), positions.to(device), found[:, 0], found[:, 1],
        slots.to(device), 0.25, 2.0,
    )  # fmt: skip
    assert returned.data_ptr() == mine.data_ptr() and returned.shape == queries.shape
    assert torch.equal(mine[:, 4:].cpu(), heads[:, 4:]), "keys and values in place"
    precision = torch.finfo(float_dtype).eps
    assert (returned.cpu().double() - queries).abs().max() <= 4 * precision
    assert torch.equal(_bits(found[:, 1]), _bits(expected[:, 1])), "values are not turned"
    stored = torch.finfo(kv_dtype).eps
    near = (found.cpu().double() - expected.double()).abs() <= stored * expected.double().abs() + 1e-6
    assert near.all()
    untouched = torch.ones(BLOCKS * SLOTS, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    rest = found.cpu().float().permute(0, 3, 1, 2, 4).flatten(0, 1)[untouched]
    assert not rest.any()


def test_block_copy_copies_every_layer(kernels: Any, device: torch.device, kv_dtype: torch.dtype) -> None:
    """A copy-on-write must take the whole block with it, and touch no other."""
    pairs = torch.tensor([[1, 4], [1, 5], [2, 3]])
    expected, found = _cache(kv_dtype).view(torch.uint8), _cache(kv_dtype, device)
    copy_reference.block_copy(expected, pairs)
    kernels.block_copy(found, pairs)
    assert torch.equal(_bits(found), expected)
    kernels.block_copy(found, torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(_bits(found), expected)


@pytest.mark.parametrize("dims", [1, 3, 5])
def test_blocks_of_odd_sizes_are_copied(kernels: Any, device: torch.device, dims: int) -> None:
    """Blocks are moved in words of up to four bytes: sizes that are no multiple must not lose their ends."""
    cache = torch.arange(4 * 7 * dims, dtype=torch.uint8).view(4, 7, dims).to(device)
    expected = cache.clone()
    copy_reference.block_copy(expected, torch.tensor([[3, 1]], device=device))
    kernels.block_copy(cache, torch.tensor([[3, 1]]))
    assert torch.equal(cache, expected)


def test_swapping_out_and_in_changes_no_bit(kernels: Any, device: torch.device, kv_dtype: torch.dtype) -> None:
    """What comes back from host memory is what left, in other blocks, and nothing else has moved."""
    cache, before = _cache(kv_dtype, device), _cache(kv_dtype)
    out, back = torch.tensor([5, 2, 3]), torch.tensor([1, 4, 2], dtype=torch.int32)
    staging = torch.zeros(4, *cache.shape[1:], device=device).to(kv_dtype)
    kernels.gather_blocks(cache, out, staging)
    assert torch.equal(_bits(staging[:3]), _bits(before.view(torch.uint8)[out]))
    assert torch.equal(_bits(cache), _bits(before)) and not staging[3].float().any()
    kernels.scatter_blocks(staging, cache, back)
    expected = before.view(torch.uint8).clone()
    swap_reference.scatter_blocks(staging[:3].cpu().view(torch.uint8), expected, back)
    assert torch.equal(_bits(cache), expected)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[1, 2], [2, 3]], r"both source and destination expected, found \[2\]"),
        ([[1, 2], [3, 2]], "each block at most once"),
        ([[1, 0]], "destinations: blocks 1 .. 5 expected, found 0"),
        ([[1, 6]], "destinations: blocks 1 .. 5 expected, found 6"),
        ([[-1, 2]], "sources: blocks 0 .. 5 expected, found -1"),
        ([[2, 2]], r"both source and destination expected, found \[2\]"),
    ],
)
def test_copies_that_depend_on_their_order_are_refused(
    kernels: Any, device: torch.device, pairs: list[list[int]], message: str
) -> None:
    """Copies run side by side: overlapping ones would give either content, at random."""
    cache = _cache(torch.float32, device)
    before = cache.clone()
    with pytest.raises(ValueError, match=message):
        kernels.block_copy(cache, torch.tensor(pairs))
    assert torch.equal(cache, before)


def test_wrong_arguments_are_named(kernels: Any, device: torch.device) -> None:
    """A caller must learn which argument does not fit before anything is written."""
    cache = _cache(torch.float32, device)
    key = torch.zeros(2, HEADS, DIM, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    keys, values = cache[:, 0, 0], cache[:, 0, 1]
    wrong: list[tuple[str, Any]] = [
        ("pairs", lambda: kernels.block_copy(cache, torch.tensor([1, 2]))),
        ("cache: contiguous blocks", lambda: kernels.block_copy(cache.transpose(1, 2), torch.tensor([[1, 2]]))),
        ("blocks: blocks 0 .. 5", lambda: kernels.gather_blocks(cache, torch.tensor([6]), cache.clone())),
        ("blocks: each block at most once", lambda: kernels.scatter_blocks(cache.clone(), cache, torch.tensor([1, 1]))),
        ("staging: at least 2", lambda: kernels.gather_blocks(cache, torch.tensor([1, 2]), cache[:1].clone())),
        ("slots", lambda: kernels.kv_write(key, key, keys, values, slots[:1])),
        ("value", lambda: kernels.kv_write(key, key[:1], keys, values, slots)),
        ("k_scale", lambda: kernels.kv_write(key, key, keys, values, slots, 0.0)),
        ("v_scale", lambda: kernels.kv_write(key, key, keys, values, slots, 1.0, float("nan"))),
        ("v_cache: shape", lambda: kernels.kv_write(key, key, keys, values[:-1], slots)),
        ("v_cache: dtype", lambda: kernels.kv_write(key, key, keys, values.half(), slots)),
        ("key: dtype", lambda: kernels.kv_write(key.double(), key.double(), keys, values, slots)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
