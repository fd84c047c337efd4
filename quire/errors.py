"""Every error that Quire expects.

    QuireError
    +-- InvalidRequestError            INVALID_ARGUMENT     INVALID_REQUEST (or INVALID_<FIELD>)
    |   +-- PromptTooLongError         INVALID_ARGUMENT     PROMPT_TOO_LONG
    |   +-- ConfigError                INVALID_ARGUMENT     INVALID_CONFIG
    +-- SequenceNotFoundError          NOT_FOUND            SEQUENCE_NOT_FOUND
    +-- SequenceExistsError            ALREADY_EXISTS       SEQUENCE_EXISTS
    +-- PoolNotFoundError              NOT_FOUND            POOL_NOT_FOUND
    +-- BlockNotFoundError             OUT_OF_RANGE         BLOCK_NOT_FOUND
    +-- ModelNotFoundError             NOT_FOUND            MODEL_NOT_FOUND
    +-- RequestExistsError             ALREADY_EXISTS       REQUEST_EXISTS
    +-- SessionNotFoundError           NOT_FOUND            SESSION_NOT_FOUND
    +-- SessionExistsError             ALREADY_EXISTS       SESSION_EXISTS
    +-- SessionBusyError               ABORTED              SESSION_BUSY
    +-- SessionLimitError              RESOURCE_EXHAUSTED   SESSION_LIMIT
    +-- BlockPoolExhaustedError        RESOURCE_EXHAUSTED   BLOCK_POOL_EXHAUSTED
    +-- PrefixPendingError             UNAVAILABLE          PREFIX_PENDING
    +-- AdmissionError                 RESOURCE_EXHAUSTED   QUEUE_FULL (or QUEUE_TIMEOUT)
    +-- TenantCeilingError             RESOURCE_EXHAUSTED   TENANT_CEILING
    +-- PinQuotaError                  RESOURCE_EXHAUSTED   PIN_QUOTA
    +-- PrefixNotFoundError            NOT_FOUND            PREFIX_NOT_FOUND
    +-- CacheInUseError                FAILED_PRECONDITION  CACHE_IN_USE
    +-- StaleEpochError                ABORTED              STALE_EPOCH
    +-- NotReadyError                  UNAVAILABLE          NOT_READY (or DRAINING)
    +-- ExecutorUnavailableError       UNAVAILABLE          EXECUTOR_UNAVAILABLE
    +-- MemoryUnavailableError         UNAVAILABLE          MEMORY_UNAVAILABLE
    +-- StoreUnavailableError          UNAVAILABLE          STORE_UNAVAILABLE
    +-- DeadlineError                  DEADLINE_EXCEEDED    DEADLINE_EXCEEDED
    +-- RequestCancelledError          CANCELLED            CANCELLED
    +-- UnsupportedError               UNIMPLEMENTED        UNSUPPORTED
    +-- ModelFormatError               FAILED_PRECONDITION  MODEL_FORMAT
    +-- CorruptionError                DATA_LOSS            CORRUPTION
    +-- InvariantError                 INTERNAL             INVARIANT_VIOLATED

An error says what was found and what is allowed. `reason` is stable and for programs, the message is for people.
`InvariantError` means a defect: the service that raises it stops, and what it held is rebuilt.
"""

from collections.abc import Mapping
from typing import ClassVar

import grpc


class QuireError(Exception):
    """An expected failure, with everything that a gRPC status carries.

    Args:
        message: one sentence for people.
        reason: stable name of the cause, `[A-Z][A-Z0-9_]+`; the class's own if not given.
        field: name of the request field or setting at fault.
        metadata: figures for programs, for example `needed_block_count`.
        retry_after: seconds after which trying again makes sense.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        metadata: Mapping[str, object] | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Keeps the arguments; metadata values become strings."""
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.retry_after = retry_after


class InvalidRequestError(QuireError):
    """A field of a request is missing, malformed or out of range."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"


class PromptTooLongError(InvalidRequestError):
    """The prompt can never fit, in the model's context or in the whole pool."""

    default_reason = "PROMPT_TOO_LONG"


class ConfigError(InvalidRequestError):
    """A setting is unknown or out of range."""

    default_reason = "INVALID_CONFIG"


class SequenceNotFoundError(QuireError):
    """No such sequence or block table, or it is closed."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "SEQUENCE_NOT_FOUND"


class SequenceExistsError(QuireError):
    """The sequence already has a block table."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "SEQUENCE_EXISTS"


class PoolNotFoundError(QuireError):
    """No such pool."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "POOL_NOT_FOUND"


class BlockNotFoundError(QuireError):
    """The pool has no block of this id."""

    code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "BLOCK_NOT_FOUND"


class ModelNotFoundError(QuireError):
    """The model is not served here."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "MODEL_NOT_FOUND"


class RequestExistsError(QuireError):
    """A live request has this id."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "REQUEST_EXISTS"


class SessionNotFoundError(QuireError):
    """There is no such session at this gateway (any more)."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "SESSION_NOT_FOUND"


class SessionExistsError(QuireError):
    """The id is that of a session."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "SESSION_EXISTS"


class SessionBusyError(QuireError):
    """The session has a turn under way."""

    code = grpc.StatusCode.ABORTED
    default_reason = "SESSION_BUSY"


class SessionLimitError(QuireError):
    """The gateway keeps as many sessions as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "SESSION_LIMIT"


class BlockPoolExhaustedError(QuireError):
    """The pool is short of blocks now; nothing was taken. The gateway waits or preempts; users never see it."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "BLOCK_POOL_EXHAUSTED"


class PrefixPendingError(QuireError):
    """Another sequence is computing the beginning of the prompt. The gateway waits for it; users never see it."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "PREFIX_PENDING"


class AdmissionError(QuireError):
    """The server is too busy: the queue is full, or the request waited too long in it."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"


class TenantCeilingError(QuireError):
    """The tenant's sequences would hold more blocks than it may; its own must end first. Users never see it."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "TENANT_CEILING"


class PinQuotaError(QuireError):
    """More blocks would be pinned for the tenant than its quota allows."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "PIN_QUOTA"


class PrefixNotFoundError(QuireError):
    """No full block of the prefix is cached."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "PREFIX_NOT_FOUND"


class CacheInUseError(QuireError):
    """The cache cannot be reset: sequences hold blocks of it."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "CACHE_IN_USE"


class StaleEpochError(QuireError):
    """The message belongs to an epoch, incarnation or step that is over."""

    code = grpc.StatusCode.ABORTED
    default_reason = "STALE_EPOCH"


class NotReadyError(QuireError):
    """The service is still loading, or already draining."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "NOT_READY"


class ExecutorUnavailableError(QuireError):
    """The executor does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "EXECUTOR_UNAVAILABLE"


class MemoryUnavailableError(QuireError):
    """The memory service does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "MEMORY_UNAVAILABLE"


class StoreUnavailableError(QuireError):
    """The metadata store (Redis) does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "STORE_UNAVAILABLE"


class DeadlineError(QuireError):
    """The deadline of the call passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class RequestCancelledError(QuireError):
    """The request was cancelled."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class UnsupportedError(QuireError):
    """Valid, but not offered."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNSUPPORTED"


class ModelFormatError(QuireError):
    """The model's files are not what they should be: missing, truncated, of an unknown or a refused format."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "MODEL_FORMAT"


class CorruptionError(QuireError):
    """A checksum does not match."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = "CORRUPTION"


class InvariantError(QuireError):
    """A state that cannot be. The service stops."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INVARIANT_VIOLATED"
