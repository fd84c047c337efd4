"""What a request has cost: for its client, and for the log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from protos.gateway.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from gateway.core.request import Request

log = structlog.get_logger(__name__)


def usage_of(request: Request) -> pb.Usage:
    """Returns what a request has cost so far."""
    now = time.monotonic()
    usage = pb.Usage(
        prompt_token_count=len(request.settings.prompt),
        cached_token_count=request.cached_token_count,
        completion_token_count=request.completion_token_count,
        preemption_count=request.preemption_count,
        peak_block_count=request.peak_block_count,
        stored_token_count=request.stored_token_count,
        shared_block_count=request.shared_block_count,
        block_seconds=request.block_seconds(now),
        recomputed_token_count=request.recomputed_token_count,
        swap_count=request.swap_count,
        swapped_block_count=request.swapped_block_count,
    )
    usage.queue_time.FromNanoseconds(int(((request.admitted_at or now) - request.arrived_at) * 1e9))
    if request.first_token_at is not None:
        usage.time_to_first_token.FromNanoseconds(int((request.first_token_at - request.arrived_at) * 1e9))
    usage.total_time.FromNanoseconds(int((now - request.arrived_at) * 1e9))
    return usage


def log_finished(request: Request, outcome: str) -> None:
    """Writes the request's one line; `outcome` says how it ended: finished, cancelled, or the reason of its error."""
    now = time.monotonic()
    first = request.first_token_at
    log.info(
        "request_finished",
        request_id=request.settings.request_id,
        model=request.settings.model,
        outcome=outcome,
        prompt_token_count=len(request.settings.prompt),
        cached_token_count=request.cached_token_count,
        completion_token_count=request.completion_token_count,
        preemption_count=request.preemption_count,
        swap_count=request.swap_count,
        queue_ms=round(((request.admitted_at or now) - request.arrived_at) * 1e3, 3),
        ttft_ms=None if first is None else round((first - request.arrived_at) * 1e3, 3),
        total_ms=round((now - request.arrived_at) * 1e3, 3),
    )
