"""What a model adds to plain attention, and the checks that all attention functions share."""

import dataclasses
import math

import torch

from kernels.checks import check_caches, check_dtype, check_last_axis_dense, check_same_device, check_shape, group_size
from kernels.layout import ACTIVATION_DTYPES

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How scores become weights."""

    scale: float
    """Factor on the products of queries and keys."""
    window: int = 0
    """Positions that a query sees, its own included; 0 for all."""
    soft_cap: float = 0.0
    """Scores are `soft_cap * tanh(score / soft_cap)`; 0 for no cap."""
    sinks: torch.Tensor | None = None
    """`[query_head]` float: a score that takes part in each head's softmax and has no value."""
    k_scale: float = 1.0
    """What a stored key is multiplied by to get the key."""
    v_scale: float = 1.0
    """What a stored value is multiplied by to get the value."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: a number is not finite, negative where that means nothing, or a scale is not positive.
        """
        for name in ("scale", "soft_cap", "k_scale", "v_scale"):
            if not math.isfinite(getattr(self, name)):
                message = f"{name}: a finite number expected, found {getattr(self, name)}"
                raise ValueError(message)
        for name in ("window", "soft_cap"):
            if getattr(self, name) < 0:
                message = f"{name}: at least 0 expected, found {getattr(self, name)}"
                raise ValueError(message)
        for name in ("k_scale", "v_scale"):
            if getattr(self, name) <= 0:
                message = f"{name}: a positive number expected, found {getattr(self, name)}"
                raise ValueError(message)

    @property
    def score_factor(self) -> float:
        """What kernels multiply products by: to base-2 exponents, or to the argument that a capped score needs."""
        factor = self.scale * self.k_scale * LOG2_E
        return 2.0 * factor / self.soft_cap if self.soft_cap else factor

    @property
    def cap_log2(self) -> float:
        """The cap, in base-2 exponents."""
        return self.soft_cap * LOG2_E


@dataclasses.dataclass(frozen=True, slots=True)
class HeadShape:
    """What a kernel is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def dims(self) -> int:
        """Elements of a head, padded to the power of two that kernels compute with."""
        return max(16, 1 << (self.head_dim - 1).bit_length())


def check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
) -> HeadShape:
    """Checks what every attention function takes, and returns the shape of its heads.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_shape("q", q, (None, None, None))
    check_dtype("q", q, ACTIVATION_DTYPES)
    check_last_axis_dense("q", q)
    check_shape("k_cache", k_cache, (None, None, None, q.shape[2]))
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group_size(q.shape[1], num_kv_heads)
    check_caches(k_cache, v_cache, num_kv_heads, q.shape[2], (q.dtype, torch.float8_e4m3fn))
    if v_cache.element_size() == 1 and any(size % 2 for size in (q.shape[2], *v_cache.stride()[:3])):
        message = f"v_cache: an even head_dim and even strides expected of float8, found {v_cache.stride()}"
        raise ValueError(message)
    check_shape("block_tables", block_tables, (context_lens.shape[0], None))
    check_dtype("block_tables", block_tables, (torch.int32,))
    check_last_axis_dense("block_tables", block_tables)
    check_shape("context_lens", context_lens, (None,))
    check_dtype("context_lens", context_lens, (torch.int32,))
    check_same_device(q=q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables, context_lens=context_lens)
    if options.sinks is not None:
        check_shape("sinks", options.sinks, (q.shape[1],))
        check_dtype("sinks", options.sinks, ACTIVATION_DTYPES)
        check_same_device(q=q, sinks=options.sinks)
    return HeadShape(q.shape[1], num_kv_heads, q.shape[2], block_size)


def check_outputs(q: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None) -> torch.Tensor:
    """Checks where results go, and returns `out`, or a new tensor if there is none.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_shape("out", out, q.shape)
    check_dtype("out", out, (q.dtype,))
    check_last_axis_dense("out", out)
    if lse is not None:
        check_shape("lse", lse, q.shape[:2])
        check_dtype("lse", lse, (torch.float32,))
        check_last_axis_dense("lse", lse)
    check_same_device(q=q, out=out, **({} if lse is None else {"lse": lse}))
    return out
