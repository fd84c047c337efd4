"""Whether what others ask of the memory core can be at all. What is wrong is named: field, found, allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

from memsvc.core import retention
from memsvc.core.prefix_views import PrefixSelector
from memsvc.core.tenancy import TenantQuota
from quire import media
from quire.errors import InvalidRequestError
from quire.hashing import DIGEST_BYTES
from quire.memory import AdmitRequest, PoolSpec

BLOCK_SIZES = (16, 32, 64)
KV_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3", "int8_per_token_head")
NAME_LENGTH_MAXIMUM = 128
TEXT_LENGTH_MAXIMUM = 512
EPOCH_MAXIMUM = 2**32 - 1
SIMULATED_SIZES_MAXIMUM = 64
_TOKEN_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class PoolRegistration:
    """An executor and its pool."""

    executor_id: str
    executor_incarnation: int
    address: str
    spec: PoolSpec


def check_registration(registration: PoolRegistration, block_count_limit: int) -> None:
    """Raises InvalidRequestError if the pool is not possible."""
    check_name(registration.executor_id, "executor_id")
    check_incarnation(registration.executor_incarnation, "executor_incarnation")
    if not 0 < len(registration.address) <= TEXT_LENGTH_MAXIMUM or ":" not in registration.address:
        raise InvalidRequestError("address: expected host:port", field="address")
    spec = registration.spec
    if not 1 < spec.block_count <= block_count_limit:
        message = f"spec.block_count: found {spec.block_count}, allowed are 2 .. {block_count_limit}"
        raise InvalidRequestError(message, field="spec.block_count")
    if spec.block_size not in BLOCK_SIZES:
        message = f"spec.block_size: found {spec.block_size}, allowed are 16, 32 and 64"
        raise InvalidRequestError(message, field="spec.block_size")
    if spec.kv_dtype not in KV_DTYPES:
        message = f"spec.kv_dtype: found {spec.kv_dtype[:64]!r}, allowed are {', '.join(KV_DTYPES)}"
        raise InvalidRequestError(message, field="spec.kv_dtype")
    if not 0 < len(spec.model_id) <= TEXT_LENGTH_MAXIMUM:
        raise InvalidRequestError("spec.model_id: 1 .. 512 characters are expected", field="spec.model_id")
    if not 0 < spec.max_model_len < 2**31:
        message = f"spec.max_model_len: found {spec.max_model_len}, allowed are 1 .. 2147483647"
        raise InvalidRequestError(message, field="spec.max_model_len")
    if not 0 <= spec.sliding_window < 2**31:
        message = f"spec.sliding_window: found {spec.sliding_window}, allowed are 0 .. 2147483647"
        raise InvalidRequestError(message, field="spec.sliding_window")


def check_name(name: str, field: str) -> None:
    """Raises InvalidRequestError if a gateway or an executor cannot have this name."""
    if not 0 < len(name) <= NAME_LENGTH_MAXIMUM:
        message = f"{field}: {len(name)} characters, allowed are 1 .. {NAME_LENGTH_MAXIMUM}"
        raise InvalidRequestError(message, field=field)


def check_incarnation(incarnation: int, field: str) -> None:
    """Raises InvalidRequestError if a process or connection cannot have this number."""
    if not 0 < incarnation < 2**64:
        raise InvalidRequestError(f"{field}: found {incarnation}, must not be 0", field=field)


def check_admission(request: AdmitRequest) -> None:
    """Raises InvalidRequestError if a field of the request cannot be."""
    if not request.token_ids or len(request.token_ids) % _TOKEN_BYTES:
        message = f"token_ids: {len(request.token_ids)} bytes, expected at least one token of {_TOKEN_BYTES} bytes"
        raise InvalidRequestError(message, field="token_ids")
    for field in ("request_id", "tenant", "cache_salt", "adapter", "session_id"):
        length = len(getattr(request, field))
        if length > TEXT_LENGTH_MAXIMUM:
            message = f"{field}: {length} characters, allowed are at most {TEXT_LENGTH_MAXIMUM}"
            raise InvalidRequestError(message, field=field)
    if not request.request_id:
        raise InvalidRequestError("request_id: is empty", field="request_id")
    if request.min_new_tokens > request.max_new_tokens:
        message = f"min_new_tokens: found {request.min_new_tokens}, allowed are 0 .. {request.max_new_tokens}"
        raise InvalidRequestError(f"{message} (max_new_tokens)", field="min_new_tokens")
    if request.retention_priority > retention.PRIORITY_MAXIMUM:
        message = f"retention_priority: found {request.retention_priority}, allowed are 0 .. 100"
        raise InvalidRequestError(message, field="retention_priority")
    if request.retention_ttl_seconds > retention.TTL_MAXIMUM:
        found = request.retention_ttl_seconds
        message = f"retention_ttl_seconds: found {found}, allowed are 0 .. {retention.TTL_MAXIMUM}"
        raise InvalidRequestError(message, field="retention_ttl_seconds")
    if request.retention_ttl_seconds and not (request.retention_priority or request.session_id):
        message = "retention_ttl_seconds: is given without retention_priority or session_id"
        raise InvalidRequestError(message, field="retention_ttl_seconds")
    known = len(request.token_ids) // _TOKEN_BYTES
    if request.swapped_token_count >= max(1, known):
        message = f"swapped_token_count: found {request.swapped_token_count}, allowed are 0 .. {known - 1}"
        raise InvalidRequestError(f"{message}, one less than token_ids", field="swapped_token_count")
    if request.media:
        media.check(request.media, len(request.token_ids) // _TOKEN_BYTES)


def check_tenant(tenant: str) -> None:
    """Raises InvalidRequestError if no tenant can have this name."""
    if len(tenant) > TEXT_LENGTH_MAXIMUM:
        message = f"tenant: {len(tenant)} characters, allowed are at most {TEXT_LENGTH_MAXIMUM}"
        raise InvalidRequestError(message, field="tenant")


def check_quota(tenant: str, quota: TenantQuota, others: Mapping[str, TenantQuota], usable: int) -> None:
    """Raises InvalidRequestError if a tenant cannot have this quota of a pool.

    Args:
        tenant: name of the tenant.
        quota: what it is to have.
        others: quotas of the pool's tenants, this one's included.
        usable: blocks of the pool that can be handed out.
    """
    check_tenant(tenant)
    figures = {"floor": quota.floor, "ceiling": quota.ceiling, "retained": quota.retained, "pinned": quota.pinned}
    for name, value in figures.items():
        least = 1 if name == "ceiling" else 0
        if value is not None and not least <= value <= usable:
            field = f"{name}_block_count"
            raise InvalidRequestError(f"{field}: found {value}, allowed are {least} .. {usable}", field=field)
    kept = quota.kept
    if quota.ceiling is not None and kept > quota.ceiling:
        message = f"ceiling_block_count: found {quota.ceiling}, less than the floor or the pins, {kept}"
        raise InvalidRequestError(message, field="ceiling_block_count")
    taken = sum(other.kept for name, other in others.items() if name != tenant)
    # Something must be left for whoever has no floor, or nobody else could ever be served.
    if kept and taken + kept >= usable:
        message = (
            f"floor_block_count: {kept} blocks and the {taken} of other tenants' floors and pins leave none of {usable}"
        )
        raise InvalidRequestError(message, field="floor_block_count")


def check_selector(selector: PrefixSelector, spec: PoolSpec) -> None:
    """Raises InvalidRequestError if no prefix in a pool of `spec` can be named so."""
    if selector.identity:
        check_identity(selector.identity)
        beside = next(
            (name for name in ("token_ids", "tenant", "cache_salt", "adapter") if getattr(selector, name)), ""
        )
        if beside:
            raise InvalidRequestError(f"{beside}: must be empty beside an identity, which says it all", field=beside)
        return
    count, rest = divmod(len(selector.token_ids), _TOKEN_BYTES)
    if not count or rest:
        message = f"token_ids: {len(selector.token_ids)} bytes, expected at least one token of {_TOKEN_BYTES} bytes"
        raise InvalidRequestError(message, field="token_ids")
    if count > spec.max_model_len:
        message = f"token_ids: {count} tokens, the longest sequence here is {spec.max_model_len} tokens"
        raise InvalidRequestError(message, field="token_ids")
    for field in ("tenant", "cache_salt", "adapter"):
        length = len(getattr(selector, field))
        if length > TEXT_LENGTH_MAXIMUM:
            message = f"{field}: {length} characters, allowed are at most {TEXT_LENGTH_MAXIMUM}"
            raise InvalidRequestError(message, field=field)


def check_simulation(block_size: int, block_counts: Sequence[int]) -> None:
    """Raises InvalidRequestError if pools cannot have such blocks, or sizes."""
    if block_size not in BLOCK_SIZES:
        raise InvalidRequestError(f"block_size: found {block_size}, allowed are 16, 32 and 64", field="block_size")
    if len(block_counts) > SIMULATED_SIZES_MAXIMUM:
        message = f"block_counts: {len(block_counts)} sizes, allowed are at most {SIMULATED_SIZES_MAXIMUM}"
        raise InvalidRequestError(message, field="block_counts")
    if any(count < 1 for count in block_counts):
        raise InvalidRequestError("block_counts: found 0, a pool has at least 1 block", field="block_counts")


def check_identity(identity: bytes) -> None:
    """Raises InvalidRequestError if no block has such an identity."""
    if len(identity) != DIGEST_BYTES:
        raise InvalidRequestError(f"identity: {len(identity)} bytes, expected {DIGEST_BYTES}", field="identity")
