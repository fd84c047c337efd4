"""What a step on a GPU consists of besides matrix products, behind one protocol.

`TorchOperations` is the plain form of all of it: what the kernels must equal, and what runs where there are none.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.nn import functional

from execsvc.gpu.kv_scales import KVScales
from execsvc.kv_cache import KVCache
from execsvc.model.layers import RMSNorm, Rotary, rotate
from execsvc.prefix_tree import GroupRules
from kernels.kv_write.reference import quantize
from kernels.layout import layer_views
from kernels.paged_attention import group_columns
from kernels.step_state import reference
from kernels.step_state.tensors import Resident, Staged

if TYPE_CHECKING:
    from kernels.paged_attention.options import HeadShape

_FEWEST_MEMBERS: Final = 2
_NO_GROUPS: Final = GroupRules(_FEWEST_MEMBERS, 1, 1)


class Operations(Protocol):
    """Functions on tensors of one device. None of them waits for the device; none looks at what tensors hold."""

    name: str
    groups: group_columns.GroupColumns | None
    """Which sequences of a step share a prefix; None where prefixes are not read for several at once."""
    group_rules: GroupRules
    """When groups pay, where there are any."""
    scales: KVScales
    """What keys and values are divided by in the cache."""

    def norm(self, rows: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Returns `rows`, normalised over the last axis."""
        ...

    def add_norm(self, rows: torch.Tensor, stream: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Returns `stream + rows`, normalised. Writes the sum to `stream`."""
        ...

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Returns `silu(gate) * up` of `[row, gate | up]`."""
        ...

    def rotate_and_write(
        self, layer: int, heads: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rotates queries and keys, and writes keys and values to the cache.

        Args:
            layer: index of the layer.
            heads: `[row, query heads | key heads | value heads, head_dim]`; may be written to.
            positions: `[row]` int64.
            slots: `[row]` int64; negative: nothing is written.

        Returns:
            The queries, `[row, query_head, head_dim]`.
        """
        ...

    def attend_last(
        self, layer: int, q: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, *, grouped: bool = False
    ) -> torch.Tensor:
        """Attends one query a sequence, the last of its `lens` tokens; see `kernels.paged_attention.decode`.

        If `grouped`, what the sequences of a group in `groups` share is read once for all of them.
        """
        ...

    def attend_chunks(
        self,
        layer: int,
        q: torch.Tensor,
        tables: torch.Tensor,
        lens: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        """Attends the last queries of each sequence, at most `longest`; see `kernels.paged_attention.prefill`."""
        ...

    def apply_writes(self, state: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> None:
        """See `kernels.step_state.reference.apply_writes`."""
        ...

    def stage_decode(self, resident: Resident, rows: torch.Tensor, staged: Staged, block_size: int) -> None:
        """See `kernels.step_state.reference.stage_decode`."""
        ...

    def advance(
        self,
        resident: Resident,
        rows: torch.Tensor,
        lens: torch.Tensor,
        sampled: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """See `kernels.step_state.reference.advance`."""
        ...


class TorchOperations:
    """Plain torch."""

    name = "torch"

    def __init__(
        self,
        cache: KVCache,
        rotary: Rotary,
        num_heads: int,
        window: int,
        groups: group_columns.GroupColumns | None = None,
        group_rules: GroupRules = _NO_GROUPS,
        scales: KVScales | None = None,
    ) -> None:
        """As the arguments say.

        Args:
            cache: KV cache.
            rotary: rotation of queries and keys.
            num_heads: query heads.
            window: each query sees its last so many positions; 0 for all.
            groups: see Operations.
            group_rules: see Operations.
            scales: see Operations; None for 1.
        """
        self.scales = KVScales(cache.layout.num_layers) if scales is None else scales
        self.groups, self.group_rules = groups, group_rules
        self._cache = cache
        self._rotary = rotary
        self._num_heads = num_heads
        self._window = window
        self._scale = cache.layout.head_dim**-0.5
        self.apply_writes = reference.apply_writes
        self.stage_decode = reference.stage_decode
        self.advance = reference.advance

    def norm(self, rows: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Operations."""
        return norm(rows)

    def add_norm(self, rows: torch.Tensor, stream: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Operations."""
        return norm(stream.add_(rows))

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Operations."""
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    def rotate_and_write(
        self, layer: int, heads: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """See Operations."""
        layout, keys_end = self._cache.layout, self._num_heads + self._cache.layout.num_kv_heads
        rotated = rotate(heads[:, :keys_end], *self._rotary.at(positions))
        written = (rotated[:, self._num_heads :], heads[:, keys_end:])
        if self.scales.measuring:
            self.scales.measure(layer, *written)
        for cached, data, scale in zip(
            layer_views(self._cache.data, layer), written, self.scales.pairs[layer], strict=True
        ):
            new = quantize(data, scale, cached.dtype)
            # Padding goes to the null block and takes what is there: shapes must not depend on content.
            blocks, offsets = slots.clamp_min(0) // layout.block_size, slots.clamp_min(0) % layout.block_size
            old = cached[blocks, :, offsets]
            cached[blocks, :, offsets] = torch.where((slots >= 0)[:, None, None], new, old)
        return rotated[:, : self._num_heads]

    def attend_last(
        self, layer: int, q: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, *, grouped: bool = False
    ) -> torch.Tensor:
        """See Operations."""
        if grouped:
            assert self.groups is not None, "there are columns where groups are asked for"
            tables = group_columns.with_shared_blocks(self.groups, tables, self._cache.layout.block_size)
        return self._attend(layer, q[:, None], tables, lens, lens[:, None] - 1)[:, 0]

    def attend_chunks(
        self,
        layer: int,
        q: torch.Tensor,
        tables: torch.Tensor,
        lens: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        """See Operations."""
        counts = (starts[1:] - starts[:-1])[:, None]
        places = torch.arange(longest, device=q.device)
        rows = (starts[:-1, None] + places).clamp_max(len(q) - 1).long()
        mixed = self._attend(layer, q[rows], tables, lens, lens[:, None] - counts + places)
        out = torch.zeros_like(q)
        used = places < counts
        out[rows[used]] = mixed[used]
        return out

    def _attend(
        self, layer: int, q: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, query_positions: torch.Tensor
    ) -> torch.Tensor:
        """Attends `[sequence, query, head, dim]` at `query_positions` `[sequence, query]` to the whole tables."""
        block_size, heads = self._cache.layout.block_size, self._cache.layout.num_kv_heads
        positions = torch.arange(tables.shape[1] * block_size, device=q.device)
        used = positions[::block_size] < lens[:, None]
        blocks = torch.where(used, tables, 0).long()
        # [sequence, block, kv_head, slot, dim] -> [sequence, kv_head, position, dim]
        keys, values = (
            cached[blocks].float().transpose(1, 2).flatten(2, 3) * scale
            for cached, scale in zip(layer_views(self._cache.data, layer), self.scales.pairs[layer], strict=True)
        )
        values = torch.where((positions < lens[:, None])[:, None, :, None], values, 0.0)
        group = q.shape[2] // heads
        queries = q.float().view(*q.shape[:2], heads, group, q.shape[3]).permute(0, 2, 3, 1, 4)
        scores = queries @ keys[:, :, None].transpose(-1, -2) * self._scale
        seen = positions <= query_positions[..., None]
        if self._window:
            seen &= query_positions[..., None] - positions < self._window
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        # A row that sees nothing is padding: zeros, not NaN.
        weights = torch.softmax(scores, -1).nan_to_num(0.0) * (lens > 0)[:, None, None, None, None]
        mixed = weights @ values[:, :, None]
        return mixed.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


class TritonOperations(TorchOperations):
    """Triton kernels."""

    name = "triton"

    def __init__(
        self,
        cache: KVCache,
        rotary: Rotary,
        num_heads: int,
        window: int,
        max_num_seqs: int,
        invariant_len: int = 0,
        *,
        cascade: bool = True,
        scales: KVScales | None = None,
    ) -> None:
        """As TorchOperations.

        Args:
            cache: KV cache.
            rotary: rotation of queries and keys.
            num_heads: query heads.
            window: each query sees its last so many positions; 0 for all.
            max_num_seqs: most sequences of a step.
            invariant_len: longest sequence, where attention must not depend on company; 0 where it may.
            cascade: whether prefixes are read once for the sequences that share them, where that can be: not with a
                window, behind which blocks are released one by one, nor with `invariant_len`.
            scales: see Operations; None for 1.
        """
        super().__init__(cache, rotary, num_heads, window, scales=scales)
        from kernels.kv_write import rotate_write  # noqa: PLC0415 - triton is imported only where it is used
        from kernels.paged_attention import configs, decode, options, prefill, prefill_split, workspace  # noqa: PLC0415 - the same
        from kernels.rms_norm import norm  # noqa: PLC0415 - the same
        from kernels.silu_mul import gate  # noqa: PLC0415 - the same
        from kernels.step_state import state  # noqa: PLC0415 - the same

        self._write, self._decode, self._prefill = rotate_write, decode, prefill
        self._norm, self._gate = norm, gate
        layout = cache.layout
        shape = options.HeadShape(num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size)
        self._options = [
            options.AttentionOptions(self._scale, window=window, k_scale=k_scale, v_scale=v_scale)
            for k_scale, v_scale in self.scales.pairs
        ]
        split_size = 0
        if invariant_len:
            tile = configs.decode_config(cache.device, shape, layout.dtype).tile
            split_size = workspace.invariant_split(invariant_len, tile)
        self._workspace = workspace.DecodeWorkspace(
            shape,
            max_num_seqs,
            layout.dtype,
            cache.device,
            windows=(window,),
            split_size=split_size,
            context_max=invariant_len,
        )
        self._prefill_workspace: prefill_split.PrefillWorkspace | None = None
        if not invariant_len:
            self._prefill_workspace = prefill_split.PrefillWorkspace(
                shape, layout.dtype, cache.device, windows=(window,)
            )
        if cascade and not window and not invariant_len:
            self._prepare_groups(shape, max_num_seqs)
        self._views = [layer_views(cache.data, layer) for layer in range(cache.layout.num_layers)]
        self.apply_writes = state.apply_writes
        self.stage_decode = state.stage_decode
        self.advance = state.advance

    def _prepare_groups(self, shape: HeadShape, max_num_seqs: int) -> None:
        """Allocates what shared prefixes need, if a program takes the queries of two sequences at least."""
        from kernels import configs  # noqa: PLC0415 - triton is imported only where it is used
        from kernels.paged_attention import cascade  # noqa: PLC0415 - the same
        from kernels.paged_attention.configs import prefix_config  # noqa: PLC0415 - the same

        layout = self._cache.layout
        members = prefix_config(self._cache.device, shape, layout.dtype).rows // shape.group
        if min(members, max_num_seqs) < _FEWEST_MEMBERS:
            return
        limits = configs.lookup("cascade", self._cache.device, head_dim=shape.dims, kv_bytes=layout.dtype.itemsize)
        token_bytes = 2 * layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize
        step_tokens = -(-limits["step_kib"] * 1024 // token_bytes)
        self.group_rules = GroupRules(members, limits["group_tokens"], step_tokens)
        group_max = min(limits["groups"], max_num_seqs // _FEWEST_MEMBERS)
        self._cascade = cascade
        self._cascade_workspace = cascade.CascadeWorkspace(self._workspace, layout.dtype, self._cache.device, group_max)
        self.groups = self._cascade_workspace.groups.columns

    def norm(self, rows: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Operations."""
        return self._norm.rms_norm(rows, norm.weight, norm.eps)

    def add_norm(self, rows: torch.Tensor, stream: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Operations."""
        return self._norm.add_rms_norm(rows, stream, norm.weight, norm.eps)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Operations."""
        return self._gate.silu_mul(gate_up)

    def rotate_and_write(
        self, layer: int, heads: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """See Operations."""
        keys, values = self._views[layer]
        if self.scales.measuring:
            self._measure_scales(layer, heads, positions)
        return self._write.rotate_and_write(
            heads, self._rotary.cosines, self._rotary.sines, positions, keys, values, slots, *self.scales.pairs[layer]
        )

    def _measure_scales(self, layer: int, heads: torch.Tensor, positions: torch.Tensor) -> None:
        """Sets the scales of a layer by what is about to be written."""
        keys_end = self._num_heads + self._cache.layout.num_kv_heads
        rotated = rotate(heads[:, self._num_heads : keys_end], *self._rotary.at(positions))
        self.scales.measure(layer, rotated, heads[:, keys_end:])
        k_scale, v_scale = self.scales.pairs[layer]
        self._options[layer] = dataclasses.replace(self._options[layer], k_scale=k_scale, v_scale=v_scale)

    def attend_last(
        self, layer: int, q: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, *, grouped: bool = False
    ) -> torch.Tensor:
        """See Operations."""
        keys, values = self._views[layer]
        if grouped:
            if layer == 0:
                self._cascade_workspace.refresh(lens)
            return self._cascade.paged_attention_cascade(
                q, keys, values, tables, lens, self._options[layer], self._cascade_workspace
            )
        if layer == 0:
            self._workspace.refresh(lens)
        return self._decode.paged_attention_decode(q, keys, values, tables, lens, self._options[layer], self._workspace)

    def attend_chunks(
        self,
        layer: int,
        q: torch.Tensor,
        tables: torch.Tensor,
        lens: torch.Tensor,
        starts: torch.Tensor,
        longest: int,  # noqa: ARG002 - the kernel needs no bound
    ) -> torch.Tensor:
        """See Operations."""
        keys, values = self._views[layer]
        if layer == 0 and self._prefill_workspace is not None:
            self._prefill_workspace.refresh(lens, starts, len(q))
        return self._prefill.paged_attention_prefill(
            q, keys, values, tables, lens, starts, self._options[layer], self._prefill_workspace
        )
