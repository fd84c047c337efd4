"""How keys and values lie in memory.

One tensor holds the whole KV cache, block-major:

    [block, layer, 2, kv_head, block_size, head_dim]        2: keys, values

so that one block is one contiguous extent, which a copy-on-write, a swap or a transfer moves in one piece. A kernel
works on one layer and gets strided views of it, `[block, kv_head, block_size, head_dim]`.

A cache of 8-bit integers has a float32 scale for each head of each token. Its last axis has head_dim + 4 bytes, so that
sizes and copies hold; where in a head's `block_size * (head_dim + 4)` bytes the scales lie, `kernels.cpu.panels` says.

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
INT8 = torch.int8
"""What a cache of the compiled CPU step may hold as well: 8-bit integers, each head of a token with a scale."""
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3",
    INT8: "int8_per_token_head",
}
"""What each is called where pools are told apart by it: in registrations, prefix hashes and hints."""


def slot_elements(head_dim: int, dtype: torch.dtype) -> int:
    """Returns the elements that a head of one token takes in a cache, those of its scale included if it has one."""
    return head_dim + torch.float32.itemsize if dtype == INT8 else head_dim


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
    """Element type, one of DTYPE_NAMES."""

    def __post_init__(self) -> None:
        """Checks the geometry.

        Raises:
            ValueError: a count is not positive, or the element type is not one of DTYPE_NAMES.
        """
        for name in ("block_count", "num_layers", "num_kv_heads", "block_size", "head_dim"):
            if getattr(self, name) < 1:
                message = f"{name}: {getattr(self, name)} is not positive"
                raise ValueError(message)
        if self.dtype not in DTYPE_NAMES:
            message = f"dtype: {self.dtype} is not one of {tuple(DTYPE_NAMES)}"
            raise ValueError(message)

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """The shape of the cache tensor."""
        slot = slot_elements(self.head_dim, self.dtype)
        return (self.block_count, self.num_layers, 2, self.num_kv_heads, self.block_size, slot)

    @property
    def head_elements(self) -> int:
        """Elements of one (block, layer, K or V, head): a contiguous run."""
        return self.block_size * slot_elements(self.head_dim, self.dtype)

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
