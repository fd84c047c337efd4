"""Plans that are run before anybody asks, to measure."""

from execsvc.engine import Engine
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import InvariantError
from quire.units import div_ceil

_REPORTED = 1
"""Most likely tokens to report; more of them take no more memory."""
_SIBLINGS = 1024


def run_step(engine: Engine, token_count: int, sequence_count: int, block_size: int) -> None:
    """Runs one step of `token_count` tokens over at most `sequence_count` sequences, and drops them.

    The cache must hold the longest of them. All of them sample, with every option on.

    Raises:
        InvariantError: the engine refused its own plan.
    """
    engine.begin_epoch(1)
    share = max(1, token_count // sequence_count)
    counts = [share] * (sequence_count - 1)
    counts.append(token_count - sum(counts))
    longest = engine.max_model_len
    counts = [piece for count in counts for piece in _pieces(count, longest)][:sequence_count]
    capacity = engine.block_count - 1
    plan, next_block = pb.StepPlan(step=1, epoch=1), 1
    scheduled: list[tuple[int, int]] = []
    for table, count in enumerate(counts, start=1):
        blocks = div_ceil(count, block_size)
        # Measuring needs the shapes, not the content: sequences may share blocks when there are not enough.
        first = next_block if next_block + blocks - 1 <= capacity else 1
        next_block = first + blocks
        sampling = pb.SamplingParams(
            temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=table, typical_p=0.9, repetition_penalty=1.1,
            prompt_token_count=count, logprobs=_REPORTED, prompt_logprobs=_REPORTED,
        )  # fmt: skip
        block_ids = columns.pack(range(first, first + blocks))
        plan.added.add(table=table, token_ids=columns.pack([0] * count), block_ids=block_ids, sampling=sampling)
        scheduled.append((table, count))
    # As many draws for siblings as there are sequences: a device makes no more of them at once.
    plan.added[0].sibling_seeds.extend(range(min(_SIBLINGS, len(counts))))
    plan.scheduled_tables = columns.pack([table for table, _ in scheduled])
    plan.scheduled_counts = columns.pack([count for _, count in scheduled])
    result = engine.apply(plan)
    engine.drop_all()
    if result.errors:
        raise InvariantError(f"the measuring step failed: {result.errors[0].message}")


def _pieces(count: int, longest: int) -> list[int]:
    """Returns `count` cut into pieces of at most `longest`."""
    return [min(longest, count - start) for start in range(0, count, longest)]
