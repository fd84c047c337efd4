"""Paged attention in torch whose results do not depend on company, bit for bit.

The same query gives the same bits whether its prompt is computed whole, in chunks or token by token, alone or in a
batch. Matrix libraries promise none of that: they choose another order of summation for another shape. What makes it
so here (measured for MKL's sgemm, and measured again at start by the executor that relies on it):

- query rows are padded to a multiple of ROW_MULTIPLE: below that the library switches to other code;
- keys come in tiles of TILE positions, and weights times values are added up tile by tile: the length of the summed
  axis is always TILE. A tile beyond a query's context has weights of exactly zero and changes no bit;
- rows of the softmax are padded with -inf to whole tiles, which adds exact zeros at the end.

`plan_tiles` is called once a step, `attend_tiles` once a layer.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from kernels.checks import check_dtype, check_shape, group_size
from kernels.layout import KV_DTYPES, KVLayout

TILE = 256
ROW_MULTIPLE = 8
QUERY_PIECE = 128
"""Most queries of one sequence in one go: bounds the scores to [kv_head, 128 * group, context]."""
_GATHER_ELEMENTS = 2**18
"""Most elements of keys gathered for one group of sequences, so that they are still in the cache when used."""

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class TileGroup:
    """Sequences (or pieces of them) with the same number of queries and of tiles: one batch of matrix products."""

    sequence_count: int
    query_count: int
    """Queries of each sequence."""
    tile_count: int
    tokens: torch.Tensor
    """`[sequence * query]` int64: rows of q and of the output."""
    head_rows: torch.Tensor
    """`[sequence * kv_head * (tile_count * TILE / block_size)]` int64: runs of the cache, for the keys of layer 0."""
    hidden: torch.Tensor
    """`[sequence, 1, query or 1, position]` bool: what a query must not see, its padding rows included."""
    stale_rows: torch.Tensor
    """int64: gathered positions past the end of each sequence, whose values are cleared: they may hold NaN."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive queries of one sequence."""

    sequence: int
    first_token: int
    query_count: int
    context_len: int
    """Cached tokens up to the last query of the piece."""

    @property
    def tile_count(self) -> int:
        return -(-self.context_len // TILE)


def _pieces(context_lens: Ints, query_starts: Ints) -> Iterator[_Piece]:
    """Yields the queries of each sequence in pieces of at most QUERY_PIECE."""
    for sequence, (start, end) in enumerate(zip(query_starts[:-1].tolist(), query_starts[1:].tolist(), strict=True)):
        first_position = int(context_lens[sequence]) - (end - start)
        for first in range(start, end, QUERY_PIECE):
            count = min(QUERY_PIECE, end - first)
            yield _Piece(sequence, first, count, first_position + (first - start) + count)


def plan_tiles(
    layout: KVLayout,
    block_tables: npt.NDArray[np.int32],
    context_lens: Ints,
    query_starts: Ints,
    window: int,
    device: torch.device,
) -> list[TileGroup]:
    """Returns how to compute one step's attention.

    Args:
        layout: of the cache; block_size divides TILE.
        block_tables: `[sequence, block_max]`; entries past a sequence's last block are unread.
        context_lens: `[sequence]`, cached tokens of each, its new ones included; at least its number of queries.
        query_starts: `[sequence + 1]`, where each sequence's queries begin.
        window: each query sees this many positions, its own included; 0 for all.
        device: where the plan is needed.

    Raises:
        ValueError: the block size does not divide TILE.
    """
    if TILE % layout.block_size:
        message = f"block_size: {layout.block_size} does not divide {TILE}"
        raise ValueError(message)
    by_shape: dict[tuple[int, int], list[_Piece]] = {}
    for piece in _pieces(context_lens, query_starts):
        by_shape.setdefault((piece.query_count, piece.tile_count), []).append(piece)
    groups: list[TileGroup] = []
    for (query_count, tile_count), pieces in by_shape.items():
        sequence_elements = tile_count * TILE * layout.num_kv_heads * layout.head_dim
        most = max(1, _GATHER_ELEMENTS // sequence_elements)
        if query_count > 1:
            most = 1
        chunks = (pieces[first : first + most] for first in range(0, len(pieces), most))
        groups.extend(_group(layout, block_tables, chunk, window, device) for chunk in chunks)
    return groups


def _group(
    layout: KVLayout, block_tables: npt.NDArray[np.int32], pieces: list[_Piece], window: int, device: torch.device
) -> TileGroup:
    """Returns the group of `pieces`, which have the same shape."""
    query_count, tile_count = pieces[0].query_count, pieces[0].tile_count
    positions = np.arange(tile_count * TILE)
    lens = np.array([piece.context_len for piece in pieces], dtype=np.int64)
    firsts = np.array([piece.first_token for piece in pieces], dtype=np.int64)
    tokens = (firsts[:, None] + np.arange(query_count)).ravel()
    # Blocks past the end are the null block, which is zeros.
    block_positions = np.arange(tile_count * TILE // layout.block_size)
    used = block_positions[None, :] * layout.block_size < lens[:, None]
    columns = np.minimum(block_positions, block_tables.shape[1] - 1)
    rows = np.array([piece.sequence for piece in pieces], dtype=np.int64)
    blocks = np.where(used, block_tables[rows[:, None], columns], 0).astype(np.int64)
    heads = np.arange(layout.num_kv_heads)
    head_rows = blocks[:, None, :] * (2 * layout.num_layers * layout.num_kv_heads) + heads[None, :, None]
    query_positions = lens[:, None] - query_count + np.arange(query_count)
    hidden = positions > query_positions[:, :, None]
    if window:
        hidden |= query_positions[:, :, None] - positions >= window
    block_ends = -(-lens // layout.block_size) * layout.block_size
    stale = (positions >= lens[:, None]) & (positions < block_ends[:, None])
    stale_rows = np.flatnonzero(np.broadcast_to(stale[:, None], (len(pieces), layout.num_kv_heads, positions.size)))

    def put(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return TileGroup(
        len(pieces), query_count, tile_count, put(tokens), put(head_rows.ravel()), put(hidden[:, None]), put(stale_rows)
    )


def attend_tiles(
    q: torch.Tensor, cache: torch.Tensor, layout: KVLayout, layer: int, groups: list[TileGroup], scale: float
) -> torch.Tensor:
    """Attends each query to its sequence's cached keys and values, causally.

    Args:
        q: `[token, query_head, head_dim]`, any float type.
        cache: the whole KV cache, of `layout`, contiguous.
        layout: of `cache`.
        layer: which layer's keys and values.
        groups: from `plan_tiles`.
        scale: factor on the scores.

    Returns:
        `[token, query_head, head_dim]`, dtype of `q`; computed in float32. Tokens in no group are unspecified.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_shape("cache", cache, layout.shape)
    check_dtype("cache", cache, KV_DTYPES)
    check_shape("q", q, (None, None, layout.head_dim))
    group = group_size(q.shape[1], layout.num_kv_heads)
    runs = cache.view(-1, layout.head_elements)
    key_runs = runs[2 * layer * layout.num_kv_heads :]
    value_runs = runs[(2 * layer + 1) * layout.num_kv_heads :]
    out = torch.empty_like(q)
    for tiles in groups:
        _attend_group(q, out, key_runs, value_runs, layout, tiles, group, scale)
    return out


def _attend_group(
    q: torch.Tensor,
    out: torch.Tensor,
    key_runs: torch.Tensor,
    value_runs: torch.Tensor,
    layout: KVLayout,
    tiles: TileGroup,
    group: int,
    scale: float,
) -> None:
    """Computes one group. Writes its tokens' rows of `out`."""
    heads, dim = layout.num_kv_heads, layout.head_dim
    batch, row_count = tiles.sequence_count * heads, tiles.query_count * group
    padded_count = -(-row_count // ROW_MULTIPLE) * ROW_MULTIPLE
    position_count = tiles.tile_count * TILE
    keys = key_runs.index_select(0, tiles.head_rows).view(batch, position_count, dim).float()
    values = value_runs.index_select(0, tiles.head_rows).view(batch, position_count, dim).float()
    values.view(-1, dim).index_fill_(0, tiles.stale_rows, 0.0)
    # [sequence, query, kv_head, head in group, dim] -> [sequence, kv_head, (query, head in group), dim]
    picked = q.index_select(0, tiles.tokens).view(tiles.sequence_count, tiles.query_count, heads, group, dim)
    rows = torch.zeros(tiles.sequence_count, heads, padded_count, dim, dtype=torch.float32, device=q.device)
    rows[:, :, :row_count].view(tiles.sequence_count, heads, tiles.query_count, group, dim).copy_(
        picked.transpose(1, 2)
    )
    rows.mul_(scale)
    scores = torch.bmm(rows.view(batch, padded_count, dim), keys.transpose(1, 2))
    _hide(scores, tiles, heads, group, row_count)
    weights = torch.softmax(scores, -1)
    mixed = torch.bmm(weights[:, :, :TILE], values[:, :TILE])
    for start in range(TILE, position_count, TILE):
        mixed.baddbmm_(weights[:, :, start : start + TILE], values[:, start : start + TILE])
    mixed = mixed[:, :row_count].view(tiles.sequence_count, heads, tiles.query_count, group, dim).transpose(1, 2)
    out.index_copy_(0, tiles.tokens, mixed.reshape(len(tiles.tokens), heads * group, dim).to(out.dtype))


def _hide(scores: torch.Tensor, tiles: TileGroup, heads: int, group: int, row_count: int) -> None:
    """Sets to -inf what a query must not see. Padding rows see what their scores of zero give: nobody reads them."""
    if tiles.query_count == 1:
        shape = (tiles.sequence_count, heads, scores.shape[1], scores.shape[2])
        scores.view(shape).masked_fill_(tiles.hidden, float("-inf"))
        return
    chunk_shape = (tiles.sequence_count, heads, tiles.query_count, group, scores.shape[2])
    scores[:, :row_count].view(chunk_shape).masked_fill_(tiles.hidden[:, :, :, None], float("-inf"))
    # NaN keys past the end would otherwise reach the padding rows and slow the product that follows.
    scores[:, row_count:] = 0.0
