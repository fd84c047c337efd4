"""Memory that decode needs besides its arguments: allocated once, at addresses that stay."""

from collections.abc import Sequence

import torch

from kernels.checks import check_shape
from kernels.paged_attention.configs import decode_config, worker_count
from kernels.paged_attention.options import HeadShape
from kernels.paged_attention.partition import Partition

_SPLITS = 32
_SHORTEST_SPLIT = 512


def invariant_split(context_max: int, tile: int) -> int:
    """Returns a split size for contexts of up to `context_max` positions: at most 32 splits, none below 512 positions.

    It depends on nothing else, so that results are the same in whatever company.
    """
    return -(-max(_SHORTEST_SPLIT, -(-context_max // _SPLITS)) // tile) * tile


class DecodeWorkspace:
    """Scratch and partitions for up to `sequence_max` sequences.

    All launches that use one workspace must be on one stream. There are two ways to share out work:

    - evenly (`split_size` 0): every worker gets the same number of tiles, whoever's they are. A result can change in
      its last bits with the company that a sequence is in.
    - invariantly (`split_size` > 0): a context is cut every `split_size` positions, and the splits are merged in order.
      A result depends on the sequence alone, bit for bit. Needs scratch for the splits of `context_max` positions.
    """

    def __init__(
        self,
        shape: HeadShape,
        sequence_max: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        *,
        windows: Sequence[int] = (0,),
        split_size: int = 0,
        context_max: int = 0,
        workers: int = 0,
    ) -> None:
        """Allocates.

        Args:
            shape: heads of the queries and the cache.
            sequence_max: most sequences of a call, padding included.
            kv_dtype: element type of the cache.
            device: where the work is done.
            windows: the windows of the model's layers (0: none); there is one partition each.
            split_size: positions of a split, a multiple of the tile; 0 to share out evenly.
            context_max: most positions of a sequence; matters with `split_size`.
            workers: programs per kv head; 0 for what fills the device.

        Raises:
            ValueError: a size does not fit.
        """
        self.shape = shape
        self.config = decode_config(device, shape, kv_dtype)
        self.sequence_max = sequence_max
        self.split_size = split_size
        tile = self.config.tile
        if sequence_max < 1:
            message = f"sequence_max: at least 1 expected, found {sequence_max}"
            raise ValueError(message)
        if split_size < 0 or split_size % tile:
            message = f"split_size: a multiple of the tile, {tile}, expected, found {split_size}"
            raise ValueError(message)
        if split_size and context_max < 1:
            message = f"context_max: at least 1 expected with split_size {split_size}, found {context_max}"
            raise ValueError(message)
        self.workers = workers or worker_count(device, shape.num_kv_heads, self.config)
        unit = max(1, split_size // tile)
        # A window that begins inside a tile touches one tile more.
        split_max = -(-(context_max + tile) // split_size) if split_size else 0
        part_max = sequence_max * split_max if split_size else sequence_max + self.workers
        self.parts = Parts(part_max, shape.num_heads, shape.head_dim, device)
        self.partitions = {
            window: Partition.allocate(sequence_max, self.workers, tile, unit, window, device) for window in windows
        }

    def refresh(self, context_lens: torch.Tensor, starts: torch.Tensor | None = None) -> None:
        """Shares out the contexts of a step; once a step, before its first layer. Does not wait for the device.

        Args:
            context_lens: `[sequence]` int32, cached tokens of each; 0 for padding.
            starts: `[sequence]` int32, positions that another kernel attends to; None for none.

        Raises:
            ValueError: more sequences than there is scratch for.
        """
        check_shape("context_lens", context_lens, (None,))
        if context_lens.shape[0] > self.sequence_max:
            message = f"context_lens: at most {self.sequence_max} sequences expected, found {context_lens.shape[0]}"
            raise ValueError(message)
        for partition in self.partitions.values():
            partition.refresh(context_lens, starts)

    def partition(self, window: int) -> Partition:
        """Returns the partition for layers with this window.

        Raises:
            ValueError: the workspace has none.
        """
        found = self.partitions.get(window)
        if found is None:
            message = f"window: one of {sorted(self.partitions)} expected (the workspace's), found {window}"
            raise ValueError(message)
        return found


class Parts:
    """Unfinished results: per part and row a weighted sum of values, the sum of weights, and the largest score."""

    def __init__(self, part_max: int, row_count: int, head_dim: int, device: torch.device) -> None:
        """Allocates `part_max` parts of `row_count` rows."""
        self.row_count = row_count
        self.acc = torch.empty(part_max, row_count, head_dim, dtype=torch.float32, device=device)
        self.maxima = torch.empty(part_max, row_count, dtype=torch.float32, device=device)
        self.sums = torch.empty(part_max, row_count, dtype=torch.float32, device=device)
