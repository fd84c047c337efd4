"""What becomes matchable in a pool and what ceases to be, told to those who keep copies of that knowledge.

Events are built only when someone asked for them. They are columns: one event tells of all blocks that one command
published or forgot. Only full blocks are told of; a partly filled block is matched by copy, within its pool.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from memsvc.core.free_order import BlockIds

Digests = npt.NDArray[np.uint64]
"""`[row, 2]`: 16-byte digests as two little-endian words."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlocksStored:
    """Full blocks that can be matched from now on.

    Attributes:
        blocks: `[row]` block ids.
        indexes: `[row]` position of the block in its sequence, 0 for the first.
        identities: 16 bytes a row.
        parents: 16 bytes a row: identity of the block before, or the root digest.
        tenant_tags: `[row]` tag of the tenant.
        token_ids: block_size packed little-endian u32 a row; empty in a snapshot without tokens.
        block_size: tokens in a block.
    """

    blocks: BlockIds
    indexes: npt.NDArray[np.int64]
    identities: bytes
    parents: bytes
    tenant_tags: npt.NDArray[np.uint32]
    token_ids: bytes
    block_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Full blocks that cannot be matched any more.

    Attributes:
        blocks: `[row]` block ids.
        indexes: `[row]` position of the block in its sequence.
        identities: 16 bytes a row.
    """

    blocks: BlockIds
    indexes: npt.NDArray[np.int64]
    identities: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing of the pool can be matched any more."""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared
