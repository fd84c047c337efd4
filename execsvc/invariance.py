"""Measures whether a result depends on company on this machine, with this build, for this model.

Matrix libraries choose their code by shape and by processor; the tiling of this package keeps results equal on those it
was tried on. Here it is tried again, at every start, so that `Describe` tells what is true.
"""

import torch

from execsvc.engine import Engine
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.units import div_ceil

_LENGTH = 40
_CHUNK = 13
_NEIGHBOURS = 3
_ALONE, _CHUNKED, _TOGETHER = 1, 2, 3


def measure_batch_invariance(engine: Engine, block_count: int) -> bool:
    """Returns whether a prompt's logits are the same bits whole, in chunks, and beside other sequences.

    Uses blocks of the cache before anybody was granted any, and clears them. False where the cache is too small to try.
    """
    neighbours = min(_NEIGHBOURS, engine.max_num_seqs)
    length = min(_LENGTH, engine.max_model_len, engine.max_num_batched_tokens)
    blocks_each = div_ceil(length, engine.block_size)
    if (2 + 1 + neighbours) * blocks_each >= block_count or engine.max_num_batched_tokens < (1 + neighbours) * length:
        return False
    seen: dict[int, torch.Tensor] = {}
    closed: list[int] = []

    def observe(tables: list[int], logits: torch.Tensor) -> None:
        seen.update((table, logits[row].clone()) for row, table in enumerate(tables))

    engine.observe_logits = observe
    engine.begin_epoch(1)
    tokens = [(7 * index + 3) % min(engine.vocab_size, 1000) for index in range(length)]

    def start(table: int, offset: int = 0) -> pb.SequenceStart:
        first = 1 + (table - 1) * blocks_each
        shifted = [(token + offset) % engine.vocab_size for token in tokens]
        return pb.SequenceStart(
            table=table, token_ids=columns.pack(shifted), block_ids=columns.pack(range(first, first + blocks_each))
        )

    def run(added: list[pb.SequenceStart], tables: list[int], count: int) -> None:
        counts = columns.pack([count] * len(tables))
        plan = pb.StepPlan(epoch=1, added=added, scheduled_tables=columns.pack(tables), scheduled_counts=counts)
        plan.removed = columns.pack(closed)
        closed.clear()
        engine.apply(plan)

    try:
        run([start(_ALONE)], [_ALONE], length)
        closed.append(_ALONE)
        for first in range(0, length, _CHUNK):
            run([start(_CHUNKED)] if first == 0 else [], [_CHUNKED], min(_CHUNK, length - first))
        closed.append(_CHUNKED)
        company = list(range(_TOGETHER, _TOGETHER + neighbours))
        run([start(table, table - _TOGETHER) for table in company], company, length)
    finally:
        engine.observe_logits = None
        engine.reset(1 + (2 + neighbours) * blocks_each)
    return all(torch.equal(seen[_ALONE], seen[table]) for table in (_CHUNKED, _TOGETHER))
