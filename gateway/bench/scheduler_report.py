"""The figures of the scheduler and of the gateway around it: what is measured, how it is meant, what was aimed at."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import statistics

from gateway.bench.front import Window
from memsvc.bench.report import Figure
from memsvc.bench.samples import Samples, median, microseconds, spread

FEW, MANY = 256, 2048

FIGURES = {
    f"schedule_and_update_{FEW}_us": Figure(
        1200,
        f"processor time of a step of {FEW} decoding sequences: its plan with growth from the lease, its result taken"
        " in, the question whether each token ends its sequence, and the journal applied by a memory in this process,"
        " hashes included; 1 sequence in block_size needs a block in every step, and as many fill one",
    ),
    f"schedule_and_update_{MANY}_us": Figure(4800, f"the same for {MANY} sequences"),
    "token_messages_per_core_s": Figure(
        15_000,
        f"messages with a token that {FEW} gRPC clients receive, for each second of processor time that the gateway"
        " takes on all its threads; an executor without a model whose steps are slow enough that no two tokens share"
        " a message",
        higher=True,
    ),
    "decode_step_overhead_us": Figure(
        20_000,
        f"time of a decode step of {FEW} sequences when the model takes none: gateway, memsvc and executor in processes"
        " of their own on loopback, and the clients, which receive every token, on this machine too",
    ),
}

PARTS = {
    **{
        f"{name}_{count}": f"of schedule_and_update_{count}_us: {what}"
        for count in (FEW, MANY)
        for name, what in (
            ("schedule", "the plan"),
            ("update", "the result"),
            ("stops", "whether tokens end their sequences"),
            ("journal", "the memory service's part"),
        )
    },
    **{f"encoding_{count}": f"beside it: the plan to protobuf, the result from it ({count})" for count in (FEW, MANY)},
    f"gateway_message_{FEW}": "processor time of the gateway for a message with one token, all threads",
    f"bare_message_{FEW}": "the same of a server that does nothing but write such messages at the same pace",
    **{
        f"{service}_step_{FEW}": f"processor time of {service} for a step of {FEW} sequences, as fast as they go"
        for service in ("gateway", "memsvc", "execsvc", "clients")
    },
}

PEER_FIGURES = tuple(f"schedule_and_update_{count}" for count in (FEW, MANY))


def build_document(
    ours: Samples,
    theirs: Samples,
    paced: list[Window],
    bare: list[Window],
    unpaced: list[Window],
    *,
    environment: Mapping[str, object],
    peer: Mapping[str, str],
) -> dict[str, object]:
    """Returns the report for JSON: the figures on top, everything else under a name of its own.

    Args:
        ours: samples of `LoopSteps`, in seconds.
        theirs: the peer's, by the same names; empty without a peer.
        paced: windows in which no two tokens share a message.
        bare: windows of a server that does nothing else.
        unpaced: windows in which steps follow each other as fast as they can.
        environment: machine and versions.
        peer: the peer's versions.
    """
    values = {
        **{f"{name}_us": microseconds(ours[name]) for name in PEER_FIGURES},
        "token_messages_per_core_s": [window.messages_per_core_second for window in paced],
        "decode_step_overhead_us": microseconds(window.step_seconds(FEW) for window in unpaced),
    }
    parts = {name: median(microseconds(ours[name])) for name in PARTS if name in ours}
    parts[f"gateway_message_{FEW}"] = median([1e6 / window.messages_per_core_second for window in paced])
    parts[f"bare_message_{FEW}"] = median([1e6 / window.messages_per_core_second for window in bare])
    for service in unpaced[0].cpu_seconds:
        seconds = [window.step_cpu_seconds(service, FEW) for window in unpaced]
        parts[f"{service}_step_{FEW}"] = median(microseconds(seconds))
    figures = {name: median(values[name]) for name in FIGURES}
    document: dict[str, object] = {
        **figures,
        "spreads": {name: dataclasses.asdict(spread(samples)) for name, samples in values.items()},
        "parts": {f"{name}_us": value for name, value in parts.items()},
        "counts": {
            "tokens_per_s": round(statistics.median(window.tokens_per_second for window in unpaced)),
            "tokens_per_message": round(
                statistics.median(window.token_count / window.message_count for window in unpaced), 2
            ),
            "paced_messages_per_s": round(statistics.median(window.message_count / window.seconds for window in paced)),
            "paced_tokens_per_message": round(
                statistics.median(window.token_count / window.message_count for window in paced), 2
            ),
        },
        "environment": dict(environment),
        "figures": {name: dataclasses.asdict(figure) for name, figure in FIGURES.items()},
        "part_notes": dict(PARTS),
    }
    if theirs:
        peer_figures = {f"{name}_us": median(microseconds(theirs[name])) for name in PEER_FIGURES}
        document["peer"] = peer_figures
        document["peer_parts"] = {f"{name}_us": median(microseconds(theirs[name])) for name in PARTS if name in theirs}
        document["ratios"] = {name: round(value / figures[name], 2) for name, value in peer_figures.items()}
        document["peer_environment"] = dict(peer)
    return document
