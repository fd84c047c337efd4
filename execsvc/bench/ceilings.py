"""What this machine can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

from collections.abc import Callable
import statistics
import time

import torch

_CUDA_COPY_BYTES, _CPU_COPY_BYTES = 2**30, 2**26
_CUDA_MATMUL_SIZE, _CPU_MATMUL_SIZE = 8192, 1024
_ROUNDS = 8


def synchronize(device: torch.device) -> None:
    """Waits until a device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """Returns the median seconds that `work` takes on `device`, after one call that is not counted."""
    samples = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Returns bytes a second of a large copy on the device, read and written bytes counted."""
    size = _CUDA_COPY_BYTES if device.type == "cuda" else _CPU_COPY_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns FLOP a second of a large square matrix product."""
    size = _CUDA_MATMUL_SIZE if device.type == "cuda" else _CPU_MATMUL_SIZE
    left = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    right = torch.randn(size, size, dtype=torch.float32, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: left @ right, device)
