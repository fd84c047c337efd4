"""The figures: what is measured, how it is meant, and what was aimed at."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import statistics

from memsvc.bench.core import PROMPT_TOKENS
from memsvc.bench.samples import Samples, Spread, median, microseconds, spread

_MILLION = 1e6


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One figure: a number that is better when it is lower, unless `higher` says otherwise."""

    target: float
    note: str
    """What exactly is counted."""
    higher: bool = False


FIGURES = {
    "step_256_decodes_inprocess_us": Figure(
        100,
        "memory bookkeeping of one decode step of 256 sequences, of which 1 in block_size needs a block and as many"
        " fill one: finding them, taking blocks from the lease, building the journal, applying it in this process,"
        " hashes and publication included; phases are shifted evenly, so that every step is an average one",
    ),
    "step_256_decodes_grpc_us": Figure(
        450,
        "the same with the journal sent to a memsvc process on loopback, until its acknowledgement is here; no step"
        " waits for it (see occupied_256_grpc_us)",
    ),
    "admit_8192_cold_us": Figure(
        700,
        "a prompt of 8,192 unseen tokens, from its admission until all its blocks are published, hashing included:"
        " cold_admit_us + cold_commit_us",
    ),
    "admit_8192_cached_us": Figure(500, "the same prompt again: every block is found, one token is left to compute"),
    "take_100_us": Figure(8, "taking 100 blocks of a pool of 100,000"),
    "free_100_us": Figure(8, "returning them"),
    "hash_mtok_per_s": Figure(30, "million tokens a second hashed into block identities, one chain", higher=True),
    "bytes_per_cached_block": Figure(200, "everything the core allocates for a pool full of cached blocks, by block"),
    "awaited_rpcs_per_decode_step": Figure(
        0,
        "calls of the memory service that the gateway's step loop awaited, and steps that a sequence sat out for want"
        " of a block, by step of a steady decode run of 256 sequences on a real lane against that process, with steps"
        " of 2 ms; counted",
    ),
    "step_4096_running_16_growing_ratio": Figure(
        1.5,
        "the step with 4,096 running sequences of which as many grow as with 256, over that with 256; without the scan"
        " that finds who grows, which the scheduler's own walk over the sequences contains (scan_*_us)",
    ),
}

PEER_FIGURES = {
    "step_256_decodes_inprocess_us": "step_256",
    "admit_8192_cold_us": "admit_8192_cold",
    "admit_8192_cached_us": "admit_8192_cached",
    "take_100_us": "take_100",
    "free_100_us": "free_100",
    "hash_mtok_per_s": "hash_8192",
    "bytes_per_cached_block": "bytes_per_cached_block",
}
"""Figures that the peer has as well, and the name of its samples."""

PARTS = {
    "scan_256": "of step_256_decodes_inprocess_us: finding which of 256 sequences need or fill a block",
    "occupied_256_grpc": "of step_256_decodes_grpc_us: until the journal is handed over and the step goes on",
    "ping_grpc": "a ping on a stream of its own and its answer, turn about with these: what any message costs here",
    "cold_admit": "of admit_8192_cold_us: look-up, blocks, table",
    "cold_commit": "of admit_8192_cold_us: the journal that confirms the prompt as written; hashes and publishes it",
    "scheduler_step": "schedule, update and journal of the real scheduler for 256 decodes: memory's part and its own",
    "scan_4096": "finding which of 4,096 sequences need or fill a block",
    "step_4096": "the whole step with 4,096 sequences running, the scan included",
    "step_256_append": "the peer, beside its step: append_output_token_ids, which hashes the blocks that became full",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What was measured.

    Attributes:
        figures: medians, by the keys of `FIGURES`.
        spreads: first and last tenth of the samples of each figure that has several.
        parts: medians in microseconds of what the figures are made of, and of what is beside them.
        peer: the peer's medians, by the same keys.
        peer_parts: its parts.
        ratios: peer / ours, or ours / peer where higher is better: above 1 is in our favour.
        counts: of the steady run.
        environment: block size, rounds, machine, versions.
        peer_environment: the peer's versions.
    """

    figures: dict[str, float]
    spreads: dict[str, Spread]
    parts: dict[str, float]
    peer: dict[str, float]
    peer_parts: dict[str, float]
    ratios: dict[str, float]
    counts: Mapping[str, object]
    environment: Mapping[str, object]
    peer_environment: Mapping[str, str]

    def document(self) -> dict[str, object]:
        """Returns the report for JSON: the figures on top, everything else under a name of its own."""
        rest: dict[str, object] = {
            "spreads": {name: dataclasses.asdict(item) for name, item in self.spreads.items()},
            "parts": {f"{name}_us": value for name, value in self.parts.items()},
            "counts": dict(self.counts),
            "environment": dict(self.environment),
            "figures": {name: dataclasses.asdict(figure) for name, figure in FIGURES.items()},
            "part_notes": dict(PARTS),
        }
        if self.peer:
            rest["peer"] = dict(self.peer)
            rest["peer_parts"] = {f"{name}_us": value for name, value in self.peer_parts.items()}
            rest["ratios"] = dict(self.ratios)
            rest["peer_environment"] = dict(self.peer_environment)
        return {**self.figures, **rest}


def build_report(
    ours: Samples,
    theirs: Samples,
    *,
    awaited: float,
    counts: Mapping[str, object],
    environment: Mapping[str, object],
    peer: Mapping[str, str],
) -> Report:
    """Returns the figures of samples in seconds."""
    named = {
        "step_256_decodes_inprocess_us": microseconds(ours["step_256"]),
        "step_256_decodes_grpc_us": microseconds(ours["step_256_grpc"]),
        **{
            f"{name}_us": microseconds(ours[name])
            for name in ("admit_8192_cold", "admit_8192_cached", "take_100", "free_100")
        },
        "hash_mtok_per_s": _rates(ours["hash_8192"]),
        "bytes_per_cached_block": ours["bytes_per_cached_block"],
        "awaited_rpcs_per_decode_step": [awaited],
        "step_4096_running_16_growing_ratio": [_growing_ratio(ours)],
    }
    peer_named = {
        key: _rates(theirs[name]) if key == "hash_mtok_per_s" else _peer_unit(key, theirs[name])
        for key, name in PEER_FIGURES.items()
        if name in theirs
    }
    figures = {key: median(named[key]) for key in FIGURES}
    peer_figures = {key: median(samples) for key, samples in peer_named.items()}
    return Report(
        figures=figures,
        spreads={key: spread(samples) for key, samples in named.items() if len(samples) > 1},
        parts={name: median(microseconds(ours[name])) for name in PARTS if name in ours},
        peer=peer_figures,
        peer_parts={name: median(microseconds(theirs[name])) for name in PARTS if name in theirs},
        ratios={key: _ratio(key, figures[key], value) for key, value in peer_figures.items()},
        counts=counts,
        environment=environment,
        peer_environment=peer,
    )


def _growing_ratio(ours: Samples) -> float:
    """Returns the median step of 4,096 over that of 256 taken beside it, both without their scans."""
    many, few = (
        statistics.median(step - scan for step, scan in zip(ours[steps], ours[scans], strict=True))
        for steps, scans in (("step_4096", "scan_4096"), ("beside_step_256", "beside_scan_256"))
    )
    return many / few


def _rates(samples: list[float]) -> list[float]:
    """Returns million tokens a second of the times for 8,192 tokens."""
    return [PROMPT_TOKENS / sample / _MILLION for sample in samples]


def _peer_unit(key: str, samples: list[float]) -> list[float]:
    return microseconds(samples) if key.endswith("_us") else samples


def _ratio(key: str, ours: float, theirs: float) -> float:
    better = ours / theirs if FIGURES[key].higher else theirs / ours
    return round(better, 2)
