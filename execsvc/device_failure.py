"""Tells a broken device from a defect.

After a device error nothing on the device can be trusted, and CUDA answers every later call with the same error; after
an out-of-memory error in the middle of a step, host and device no longer agree. Both end the incarnation: the process
exits, and what it held is computed again elsewhere or by its successor.
"""

from typing import Final

import torch

from quire.errors import ExecutorUnavailableError

EXIT_DEVICE: Final = 3
"""Exit status of a process whose device failed: another start may well work."""

OUT_OF_MEMORY: Final = "out_of_memory"
DEVICE_ERROR: Final = "device_error"

# How libraries that raise a plain RuntimeError begin theirs.
_SIGNS: Final = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS_", "cuBLAS", "CUDNN_STATUS_", "Triton Error [CUDA]")


def kind_of(error: BaseException) -> str | None:
    """Returns OUT_OF_MEMORY, DEVICE_ERROR, or None for what is no failure of the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        return DEVICE_ERROR
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        return DEVICE_ERROR
    return None


def first_line(error: BaseException) -> str:
    """Returns what an error says in one line: CUDA's have advice for programmers below."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def unavailable(error: BaseException) -> ExecutorUnavailableError:
    """Returns what gateways and memsvc are told of a failure that ends this incarnation."""
    kind = kind_of(error)
    if kind is None:
        return ExecutorUnavailableError("the executor has failed and is ending", reason="EXECUTOR_FAILED")
    return ExecutorUnavailableError(
        f"the executor's device has failed and the executor is ending: {first_line(error)}", reason="DEVICE_FAILED"
    )
