"""What a scheduler and its executor tell each other: a description at first, then drafts and outcomes of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.core.precedence import SchedulingPolicy
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence
from gateway.core.siblings import waiting_samples
from gateway.core.step import LogprobRow, StepDraft, StepOutcome
from gateway.core.stopping import withheld_tokens
from gateway.core.swapping import PreemptionMode, SwapSettings
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns

if TYPE_CHECKING:
    from gateway.config import GatewayConfig
    from quire.memory import PoolInfo

_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the samples of one request draw from different streams (the increment of SplitMix64)."""
_SEED_MASK = 2**64 - 1


def sample_seed(seed: int, index: int) -> int:
    """Returns the seed of sample `index` of a request; sample 0 has the request's own."""
    return (seed + index * _SEED_STRIDE) & _SEED_MASK


def _sequence_start(sequence: Sequence) -> pb.SequenceStart:
    """Returns what the executor needs to begin with a sequence."""
    sampling = sequence.request.settings.sampling
    withheld, withheld_until = withheld_tokens(sequence)
    return pb.SequenceStart(
        table=sequence.table,
        token_ids=columns.pack(sequence.tokens),
        block_ids=columns.pack(sequence.blocks),
        computed_token_count=sequence.begun_at,
        sampling=pb.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sample_seed(sampling.seed, sequence.index),
            withheld_tokens=columns.pack(withheld),
            withheld_until=withheld_until,
            **_special_params(sequence),
        ),
        sibling_seeds=[sample_seed(sampling.seed, sample.index) for sample in waiting_samples(sequence)],
    )


def _special_params(sequence: Sequence) -> dict[str, Any]:
    """Returns the parameters that few requests have."""
    settings = sequence.request.settings
    sampling = settings.sampling
    params: dict[str, Any] = {}
    if sampling.typical_p != 1.0:
        params["typical_p"] = sampling.typical_p
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        params["repetition_penalty"], params["frequency_penalty"], params["presence_penalty"] = penalties
        params["prompt_token_count"] = sequence.prompt_length
    if sampling.logit_bias:
        params["bias_tokens"] = columns.pack([token for token, _ in sampling.logit_bias])
        params["bias_values"] = columns.pack_floats([value for _, value in sampling.logit_bias])
    if settings.grammar:
        params["grammar"] = settings.grammar
        params["prompt_token_count"] = sequence.prompt_length
    if settings.logprob_count is not None:
        params["logprobs"] = settings.logprob_count
    if not sequence.index and sequence.request.wants_prompt_logprobs:
        params["prompt_logprobs"] = settings.prompt_logprobs
        params["prompt_token_count"] = sequence.prompt_length
    return params


def _logprob_rows(message: pb.Logprobs) -> list[LogprobRow]:
    """Returns the rows of log-probabilities; raises InvalidRequestError if its columns do not fit together."""
    tables = columns.unpack_list(message.tables, "logprobs.tables")
    positions = columns.unpack_list(message.positions, "logprobs.positions", row_count=len(tables))
    ranks = columns.unpack_list(message.ranks, "logprobs.ranks", row_count=len(tables))
    counts = columns.unpack_list(message.counts, "logprobs.counts", row_count=len(tables))
    token_ids = columns.unpack_list(message.token_ids, "logprobs.token_ids", row_count=sum(counts))
    values = columns.unpack_floats(message.values, "logprobs.values", row_count=sum(counts))
    rows, start = [], 0
    for table, position, rank, count in zip(tables, positions, ranks, counts, strict=True):
        end = start + count
        rows.append(LogprobRow(table, position, rank, token_ids[start:end], values[start:end]))
        start = end
    return rows


def scheduler_for(pool: PoolInfo, description: pb.DescribeResponse, config: GatewayConfig) -> Scheduler:
    """Returns a scheduler for an executor that describes itself so; what it allows bounds what is set."""
    budget = description.max_num_batched_tokens
    if config.max_num_batched_tokens is not None:
        budget = min(budget, config.max_num_batched_tokens)
    return Scheduler(
        pool,
        max_num_seqs=min(config.max_num_seqs, description.max_num_seqs),
        max_num_batched_tokens=budget,
        max_preemptions=config.max_preemptions,
        policy=SchedulingPolicy(config.scheduling_policy),
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        swap=SwapSettings(
            description.swap_slot_count,
            description.swap_out_bytes_per_second,
            description.swap_in_bytes_per_second,
            PreemptionMode(config.preemption_mode),
        ),
    )


def to_plan(draft: StepDraft, step: int, epoch: int) -> pb.StepPlan:
    """Returns a draft as step number `step`."""
    plan = pb.StepPlan(
        step=step,
        epoch=epoch,
        removed=columns.pack(draft.removed),
        added=[_sequence_start(sequence) for sequence in draft.added],
        appended=columns.pack(draft.appended),
        copies=columns.pack(draft.copies),
        scheduled_tables=columns.pack(draft.scheduled_tables),
        scheduled_counts=columns.pack(draft.scheduled_counts),
    )
    if draft.swap_out or draft.swap_in or draft.swap_freed:
        plan.swap_out, plan.swap_in = columns.pack(draft.swap_out), columns.pack(draft.swap_in)
        plan.swap_freed = columns.pack(draft.swap_freed)
    return plan


def to_outcome(result: pb.StepResult) -> StepOutcome:
    """Returns what a result says.

    Raises:
        InvalidRequestError: its columns do not fit together.
    """
    written = columns.unpack_list(result.written_tables, "written_tables")
    sampled = columns.unpack_list(result.sampled_tables, "sampled_tables")
    siblings = columns.unpack_list(result.sibling_tables, "sibling_tables")
    return StepOutcome(
        written_tables=written,
        written_counts=columns.unpack_list(result.written_counts, "written_counts", row_count=len(written)),
        sampled_tables=sampled,
        sampled_tokens=columns.unpack_list(result.sampled_tokens, "sampled_tokens", row_count=len(sampled)),
        fenced=columns.unpack_list(result.fenced, "fenced"),
        sibling_tables=siblings,
        sibling_tokens=columns.unpack_list(result.sibling_tokens, "sibling_tokens", row_count=len(siblings)),
        logprobs=_logprob_rows(result.logprobs) if result.HasField("logprobs") else [],
        errors=[(error.table, error.reason, error.message) for error in result.errors],
        swap_refused=columns.unpack_list(result.swap_refused, "swap_refused") if result.swap_refused else [],
        swap_slots_elsewhere=result.swap_slots_elsewhere,
        seconds=(result.model_ns + result.sample_ns) / 1e9,
    )
