"""How keys and values lie in memory.

One tensor holds the whole KV cache, block-major:

    [block, layer, 2, kv_head, block_size, head_dim]        2: keys, values

so that one block is one contiguous extent, which a copy-on-write, a swap or a transfer moves in one piece. A kernel
works on one layer and gets strided views of it, `[block, kv_head, block_size, head_dim]`.

Block 0 is the null block. It is all zeros, is never granted and never written; tables point at it where they end.
"""

import dataclasses

import torch

from kernels.cpu.memory import advise_huge_pages

NULL_BLOCK = 0
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a model computes in."""
KV_DTYPES = (*ACTIVATION_DTYPES, torch.float8_e4m3fn)
"""What a cache holds. float8 holds keys and values divided by a scale; it needs compute capability 8.9."""


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """Geometry of a KV cache."""

    block_count: int
    """Blocks, the null block included."""
    num_layers: int
    """Layers of the model."""
    num_kv_heads: int
    """Key and value heads of a layer."""
    block_size: int
    """Token slots in a block."""
    head_dim: int
    """Elements of a head."""
    dtype: torch.dtype
    """Element type, one of KV_DTYPES."""

    def __post_init__(self) -> None:
        """Checks the geometry.

        Raises:
            ValueError: a count is not positive, or the element type is not one of KV_DTYPES.
        """
        for name in ("block_count", "num_layers", "num_kv_heads", "block_size", "head_dim"):
            if getattr(self, name) < 1:
                message = f"{name}: {getattr(self, name)} is not positive"
                raise ValueError(message)
        if self.dtype not in KV_DTYPES:
            message = f"dtype: {self.dtype} is not one of {KV_DTYPES}"
            raise ValueError(message)

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """The shape of the cache tensor."""
        return (self.block_count, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def head_elements(self) -> int:
        """Elements of one (block, layer, K or V, head): a contiguous run of block_size * head_dim."""
        return self.block_size * self.head_dim

    @property
    def layer_elements(self) -> int:
        """Elements of one (block, layer), K and V."""
        return 2 * self.num_kv_heads * self.head_elements

    @property
    def block_elements(self) -> int:
        """Elements of one block: the stride of the first axis, in elements."""
        return self.num_layers * self.layer_elements

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block, all layers, K and V."""
        return self.block_elements * self.dtype.itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.block_count * self.bytes_per_block

    def allocate(self, device: torch.device) -> torch.Tensor:
        """Returns a zeroed cache of `shape` on `device`, on a CPU in huge pages if the system has them."""
        cache = torch.empty(self.shape, dtype=self.dtype, device=device)
        if device.type == "cpu":
            advise_huge_pages(cache)
        return cache.zero_()


def layer_views(cache: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys and the values of one layer, each `[block, kv_head, block_size, head_dim]`, as views."""
    return cache[:, layer, 0], cache[:, layer, 1]
