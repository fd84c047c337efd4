"""The forward pass of one batch."""

import torch

from execsvc.attention import AttentionBackend
from execsvc.batch import Batch
from execsvc.model.llama import Llama


class Runner:
    """A model and the attention it uses."""

    def __init__(self, model: Llama, attention: AttentionBackend) -> None:
        """Keeps both."""
        self.model = model
        self.attention = attention

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Computes the batch: writes keys and values of its tokens.

        Returns:
            `[sampled, vocabulary]` logits, a row for each sequence of `batch.sampled`.
        """
        self.attention.begin(batch)
        stream = self.model.hidden(batch.tokens, batch.positions, self.attention.attend)
        rows = stream.index_select(0, batch.sampled_rows)
        if not len(rows):
            return rows.new_empty(0, self.model.config.vocab_size)
        return self.model.logits(rows)[: len(batch.sampled)]
