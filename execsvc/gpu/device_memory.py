"""What a device says of its memory."""

from __future__ import annotations

import gc
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """Memory of one device, in bytes."""

    name: str

    def free_and_total(self) -> tuple[int, int]:
        """Returns what the driver can still give, and what the device has."""
        ...

    def allocated(self) -> int:
        """Returns what tensors of this process take."""
        ...

    def reserved(self) -> int:
        """Returns what this process has taken from the driver for tensors, in use or not."""
        ...

    def start_peak(self) -> None:
        """Begins to watch for the highest `allocated`."""
        ...

    def peak(self) -> int:
        """Returns the highest `allocated` since `start_peak`."""
        ...

    def release(self) -> None:
        """Gives memory back to the driver that no tensor uses."""
        ...


class CudaMemory:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = str(device)

    def free_and_total(self) -> tuple[int, int]:
        """See DeviceMemory."""
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return free, total

    def allocated(self) -> int:
        """See DeviceMemory."""
        return torch.cuda.memory_allocated(self._device)

    def reserved(self) -> int:
        """See DeviceMemory."""
        return torch.cuda.memory_reserved(self._device)

    def start_peak(self) -> None:
        """See DeviceMemory."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """See DeviceMemory."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def release(self) -> None:
        """See DeviceMemory."""
        gc.collect()
        torch.cuda.empty_cache()
