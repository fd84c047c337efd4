"""A picture of a load: what was under way, what memory held, and how long clients waited."""

from __future__ import annotations

from typing import Any, Final

from gateway.simulate.plot import pyplot_module

_INCHES: Final = (9.0, 9.0)
_DARK, _LIGHT, _RED = "#2b7a78", "#8fc1b5", "#d1495b"


def draw(document: dict[str, Any], path: str) -> None:
    """Writes the picture of a report to a .png or .svg file; raises ConfigError if it cannot."""
    pyplot = pyplot_module()
    columns = document["timeline"]
    figure, (load, memory, waits) = pyplot.subplots(3, 1, figsize=_INCHES, layout="constrained")
    load.plot(columns["at_s"], columns["running"], color=_DARK, label="requests under way")
    load.set_ylabel("requests")
    rates = load.twinx()
    rates.plot(columns["at_s"], columns["tokens_per_s"], color=_LIGHT, label="tokens a second")
    rates.set_ylabel("tokens/s")
    if "kv_utilization" in columns:
        memory.plot(columns["at_s"], columns["kv_utilization"], color=_DARK, label="token slots in use")
    memory.plot(columns["at_s"], columns["recompute_tax"], color=_RED, label="computed twice, so far")
    memory.set_ylim(0, 1)
    memory.set_ylabel("share")
    memory.set_xlabel("seconds")
    names = [name for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms") if document[name]]
    marks = [mark for mark in next((document[name] for name in names), {}) if mark.startswith("p")]
    for place, name in enumerate(names):
        heights = [document[name][mark] for mark in marks]
        waits.bar([index + place / (len(names) + 1) for index in range(len(marks))], heights,
                  1 / (len(names) + 1), label=name)  # fmt: skip
    waits.set_xticks(range(len(marks)), marks)
    if names:
        waits.set_yscale("log")
    waits.set_ylabel("ms")
    for panel in (load, rates, memory, waits):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper left" if panel is not rates else "upper right")
    figure.savefig(path)
    pyplot.close(figure)
