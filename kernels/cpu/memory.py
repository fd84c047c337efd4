"""Huge pages for what is read whole in every step: fewer entries of the address cache, more bandwidth."""

import ctypes
import mmap
from typing import Final

import torch

_ADVICE: Final = 14
"""MADV_HUGEPAGE of Linux."""
_HUGE: Final = 2 * 1024 * 1024


def advise_huge_pages(tensor: torch.Tensor) -> bool:
    """Asks the system to back a tensor with huge pages; returns whether it agreed. Best before its first use."""
    start = -(-tensor.data_ptr() // _HUGE) * _HUGE
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE * _HUGE
    if end <= start or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(advise(start, end - start, _ADVICE) == 0)
