"""Whether what others ask of the memory core can be at all. What is wrong is named: field, found, allowed."""

from __future__ import annotations

import dataclasses

from quire import media
from quire.errors import InvalidRequestError
from quire.memory import AdmitRequest, PoolSpec

BLOCK_SIZES = (16, 32, 64)
KV_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3")
NAME_LENGTH_MAXIMUM = 128
TEXT_LENGTH_MAXIMUM = 512
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
    for field in ("request_id", "tenant", "cache_salt", "adapter"):
        length = len(getattr(request, field))
        if length > TEXT_LENGTH_MAXIMUM:
            message = f"{field}: {length} characters, allowed are at most {TEXT_LENGTH_MAXIMUM}"
            raise InvalidRequestError(message, field=field)
    if not request.request_id:
        raise InvalidRequestError("request_id: is empty", field="request_id")
    if request.media:
        media.check(request.media, len(request.token_ids) // _TOKEN_BYTES)
