"""What a load amounts to: rates, percentiles, goodput, refusals, and memory over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
import math
from typing import Any, Final

import numpy as np

from gateway.bench.serve.load import Result
from gateway.bench.serve.record import Record
from gateway.bench.serve.watch import PoolSample
from quire.errors import ConfigError

PERCENTILES: Final = (50, 90, 95, 99)
OBJECTIVES: Final = ("ttft", "tpot", "e2el")
"""What may be asked of a request, in milliseconds: time to first token, time of a token after it, time to the end."""
_MILLI = 1e3
_MOMENTS = 120


def parse_objectives(texts: Iterable[str]) -> dict[str, float]:
    """Returns objectives written as NAME:MILLISECONDS, by name; raises ConfigError."""
    objectives = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            milliseconds = float(limit)
        except ValueError:
            milliseconds = math.nan
        if name not in OBJECTIVES or not milliseconds > 0:
            message = f"--goodput: found {text!r}, expected NAME:MILLISECONDS with a name of {', '.join(OBJECTIVES)}"
            raise ConfigError(message, field="goodput")
        objectives[name] = milliseconds
    return objectives


def _distribution(seconds: Iterable[float | None]) -> dict[str, float]:
    """Returns mean, percentiles and maximum in milliseconds; empty without samples."""
    values = np.array([value for value in seconds if value is not None]) * _MILLI
    if not values.size:
        return {}
    marks = np.percentile(values, PERCENTILES)
    named = {f"p{mark}": round(float(value), 3) for mark, value in zip(PERCENTILES, marks, strict=True)}
    return {"mean": round(float(values.mean()), 3), **named, "max": round(float(values.max()), 3)}


def _gaps(records: Iterable[Record]) -> list[float]:
    """Returns the times between messages with tokens."""
    return [gap for record in records for gap in np.diff(record.token_times).tolist()]


def _meets(record: Record, objectives: Mapping[str, float]) -> bool:
    """Whether a request has met every objective; one that does not apply to it is met."""
    found = {"ttft": record.first_token_seconds, "tpot": record.seconds_per_token, "e2el": record.seconds}
    return not any((found[name] or 0.0) * _MILLI > limit for name, limit in objectives.items())


def recompute_tax(records: Iterable[Record]) -> float:
    """Returns the share of computed tokens that were computed again."""
    taken = list(records)
    computed = sum(record.computed_token_count for record in taken)
    return sum(record.recomputed_token_count for record in taken) / computed if computed else 0.0


def timeline(result: Result, samples: list[PoolSample]) -> dict[str, list[float]]:
    """Returns columns over time: moments, requests under way, tokens a second, memory, recompute tax so far."""
    seconds = max(result.seconds, 1e-9)
    edges = np.linspace(0.0, seconds, min(_MOMENTS, max(2, math.ceil(seconds * 4))) + 1)
    moments = edges[1:]
    sent = np.sort([record.sent_at for record in result.records])
    ended = np.sort([record.ended_at for record in result.records])
    arrivals = [(moment, record.token_count / len(record.token_times)) for record in result.records
                for moment in record.token_times]  # fmt: skip
    times, weights = zip(*arrivals, strict=True) if arrivals else ((), ())
    tokens, _ = np.histogram(times, edges, weights=weights)
    done = [[record for record in result.records if record.ended_at <= moment] for moment in moments]
    columns = {
        "at_s": moments,
        "running": np.searchsorted(sent, moments, "right") - np.searchsorted(ended, moments, "right"),
        "tokens_per_s": tokens / np.diff(edges),
        "recompute_tax": np.array([recompute_tax(records) for records in done]),
    }
    if samples:
        at = [sample.at for sample in samples]
        for name in ("utilization", "used_block_count", "cached_block_count", "sequence_count"):
            columns[f"kv_{name}"] = np.interp(moments, at, [getattr(sample, name) for sample in samples])
    return {name: np.round(values, 6).tolist() for name, values in columns.items()}


def build_document(
    result: Result, samples: list[PoolSample], objectives: Mapping[str, float], about: Mapping[str, object]
) -> dict[str, Any]:
    """Returns the report for JSON.

    Args:
        result: of the load.
        samples: of the pools; empty if they were not watched.
        objectives: milliseconds that a request must meet to count as good, by name.
        about: what was loaded, and how.
    """
    good = [record for record in result.records if not record.failure]
    failed = [record for record in result.records if record.failure]
    output = sum(record.token_count for record in good)
    prompt = sum(record.prompt_token_count for record in good)
    met = sum(_meets(record, objectives) for record in good)
    document: dict[str, Any] = {
        "about": dict(about),
        "duration_s": round(result.seconds, 3),
        "sent": len(result.records),
        "completed": len(good),
        "skipped_too_long": result.skipped_count,
        "failures": dict(Counter(record.failure for record in failed).most_common()),
        "refusal_ms": _distribution(record.seconds for record in failed if not record.token_times),
        "request_throughput_per_s": round(len(good) / result.seconds, 3),
        "output_throughput_tokens_per_s": round(output / result.seconds, 3),
        "total_throughput_tokens_per_s": round((output + prompt) / result.seconds, 3),
        "ttft_ms": _distribution(record.first_token_seconds for record in good),
        "tpot_ms": _distribution(record.seconds_per_token for record in good),
        "itl_ms": _distribution(_gaps(good)),
        "e2el_ms": _distribution(record.seconds for record in good),
        "queue_ms": _distribution(record.queue_seconds for record in good),
        "prompt_tokens": prompt,
        "cached_prompt_share": round(sum(record.cached_token_count for record in good) / prompt, 6) if prompt else 0.0,
        "output_tokens": output,
        "preemptions": sum(record.preemption_count for record in good),
        "swaps": sum(record.swap_count for record in good),
        "recompute_tax": round(recompute_tax(good), 6),
        "client_lateness_ms": round(result.lateness_seconds * _MILLI, 3),
    }
    if objectives:
        document["goodput_requests_per_s"] = round(met / result.seconds, 3)
        document["goodput_share"] = round(met / len(result.records), 6) if result.records else 0.0
    if samples:
        busy = [sample.utilization for sample in samples]
        document["kv_utilization"] = {"mean": round(float(np.mean(busy)), 6), "max": round(max(busy), 6)}
    document["timeline"] = timeline(result, samples)
    return document
