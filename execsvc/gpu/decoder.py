"""The forward pass on a GPU: the weights of `execsvc.model.llama`, a fused operation at each place that has one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from execsvc.gpu.operations import Operations
from execsvc.model.llama import Layer, Llama

Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, queries `[row, head, dim]`) -> `[row, head, dim]`; keys and values of the rows are written already."""


class Decoder:
    """A model and the operations that it is computed with."""

    def __init__(self, model: Llama, operations: Operations) -> None:
        self.model = model
        self.operations = operations

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Returns the residual stream after the last layer, normalised, `[row, hidden_size]`.

        Args:
            tokens: `[row]` int64.
            positions: `[row]` int64.
            slots: `[row]` int64; negative: keys and values are not written.
            attend: computes attention.
        """
        model, operations = self.model, self.operations
        stream = functional.embedding(tokens, model.embeddings)
        layers = model.layers
        rows = operations.norm(stream, layers[0].input_norm)
        for index, layer in enumerate(layers):
            heads = self._heads(layer, rows)
            q = operations.rotate_and_write(index, heads, positions, slots)
            mixed = attend(index, q)
            rows = operations.add_norm(layer.output(mixed.flatten(1)), stream, layer.mlp_norm)
            rows = layer.down(operations.gate(layer.gate_up(rows)))
            following = layers[index + 1].input_norm if index + 1 < len(layers) else model.final_norm
            rows = operations.add_norm(rows, stream, following)
        return rows

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `[row, vocab_size]` for rows of `hidden`."""
        return self.model.head(rows)

    def _heads(self, layer: Layer, rows: torch.Tensor) -> torch.Tensor:
        """Returns `[row, query | key | value heads, head_dim]`, queries and keys normalised where the model does so."""
        config, operations = self.model.config, self.operations
        heads = layer.qkv(rows).view(len(rows), -1, config.head_dim)
        if layer.q_norm is None or layer.k_norm is None:
            return heads
        keys_end = config.num_heads + config.num_kv_heads
        q, k, v = heads[:, : config.num_heads], heads[:, config.num_heads : keys_end], heads[:, keys_end:]
        return torch.cat([operations.norm(q, layer.q_norm), operations.norm(k, layer.k_norm), v], 1)
