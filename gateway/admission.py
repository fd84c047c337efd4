"""What a gateway asks of the memory service for a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.stopping import certain_tokens
from quire import columns
from quire.memory import AdmitRequest, PoolInfo

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


def admit_request(pool: PoolInfo, sequence: Sequence, *, wait_for_prefix: bool) -> AdmitRequest:
    """Returns the request for a table of `pool`; `wait_for_prefix`: rather wait than compute what another one does."""
    settings = sequence.request.settings
    swapped = sequence.swapped.token_count if sequence.swapped is not None else 0
    return AdmitRequest(
        pool_id=pool.pool_id,
        epoch=pool.epoch,
        request_id=settings.request_id,
        sample_index=sequence.index,
        token_ids=columns.pack(sequence.tokens),
        tenant=settings.tenant,
        cache_salt=settings.cache_salt,
        # What is found in the cache has no logits.
        skip_cache_read=settings.skip_cache_read or (not sequence.index and sequence.request.wants_prompt_logprobs),
        skip_cache_write=settings.skip_cache_write,
        max_new_tokens=sequence.length_limit - len(sequence.tokens),
        min_new_tokens=certain_tokens(sequence),
        resumed=sequence.preemption_count > 0,
        # What is in host memory is not computed again: there is nothing to wait for.
        wait_for_prefix=wait_for_prefix and not swapped,
        session_id=settings.session_id,
        retention_ttl_seconds=settings.retention_ttl,
        swapped_token_count=swapped,
    )
