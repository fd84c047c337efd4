"""The decode sizes that are captured: a batch is padded to the next one."""

from typing import Final

_SMALL: Final = (1, 2, 4)
_FINE_STEP: Final = 8
_FINE_END: Final = 256
_COARSE_STEP: Final = 16


def ladder(max_num_seqs: int) -> list[int]:
    """Returns the sizes, ascending: 1, 2, 4, then every 8th up to 256, then every 16th; the last is max_num_seqs."""
    sizes = [size for size in _SMALL if size < max_num_seqs]
    sizes += range(_FINE_STEP, min(max_num_seqs, _FINE_END + 1), _FINE_STEP)
    sizes += range(_FINE_END + _COARSE_STEP, max_num_seqs, _COARSE_STEP)
    return [*sizes, max_num_seqs]


def rung_of_size(sizes: list[int]) -> list[int]:
    """Returns for each batch size, from 0, the captured size that it is padded to."""
    rungs: list[int] = []
    for size in sizes:
        rungs += [size] * (size + 1 - len(rungs))
    return rungs
