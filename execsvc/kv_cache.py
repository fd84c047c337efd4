"""The physical KV cache."""

import torch

from kernels.block_copy import reference
from kernels.layout import KVLayout


class KVCache:
    """Keys and values of every block, in one tensor.

    Block 0, the null block, stays zero: the attention reads it where tables end.
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        """Allocates the tensor, zeroed, so that its pages exist before the first step."""
        self.layout = layout
        self.device = device
        self.data = layout.allocate(device)

    def copy_blocks(self, pairs: torch.Tensor) -> None:
        """Copies whole blocks, all layers. Writes `data`.

        Args:
            pairs: `[copy, 2]` int64 on the device, (source, destination); no destination is a source.
        """
        if len(pairs) == 0:
            return
        if self.device.type == "cuda":
            from kernels.block_copy.copy import block_copy  # noqa: PLC0415 - triton only where a GPU is

            block_copy(self.data, pairs)
        else:
            reference.block_copy(self.data, pairs)
