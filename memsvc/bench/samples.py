"""Timings, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import statistics
import time

Samples = dict[str, list[float]]
"""Seconds (or plain values) by the name of the measurement."""

_MICROSECONDS = 1e6
_TENTHS = 10
_FEWEST_FOR_TENTHS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Where the middle eight tenths of some samples lie, in their unit."""

    low: float
    """A tenth of the samples is below."""
    high: float
    """A tenth of the samples is above."""
    count: int
    """Samples."""


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that `call` takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def merge(into: Samples, more: Samples) -> None:
    """Appends the samples of `more` to those of `into`."""
    for name, values in more.items():
        into.setdefault(name, []).extend(values)


def microseconds(samples: Iterable[float]) -> list[float]:
    """Returns seconds as microseconds."""
    return [sample * _MICROSECONDS for sample in samples]


def median(samples: list[float]) -> float:
    """Returns the median, to three significant digits behind the point at most."""
    return round(statistics.median(samples), 3)


def spread(samples: list[float]) -> Spread:
    """Returns the first and the last tenth of `samples`; of a single one, the sample itself."""
    if len(samples) < _FEWEST_FOR_TENTHS:
        return Spread(round(samples[0], 3), round(samples[0], 3), len(samples))
    tenths = statistics.quantiles(samples, n=_TENTHS, method="inclusive")
    return Spread(round(tenths[0], 3), round(tenths[-1], 3), len(samples))
