"""A picture of what the slots of the pool hold over time, one panel for each policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from quire.errors import ConfigError

if TYPE_CHECKING:
    from gateway.simulate.measure import PolicyResult

FORMATS: Final = (".png", ".svg")
_POINTS: Final = 600
_INCHES: Final = (9.0, 2.4)
_KINDS: Final = (
    ("holds tokens", "#2b7a78"),
    ("pre-allocated, to be used", "#8fc1b5"),
    ("wasted inside reservations and blocks", "#d1495b"),
    ("free, cached, or of no use in its shape", "#e8e8e8"),
)


def check(path: str) -> None:
    """Raises ConfigError if no picture can be written to `path`: before anything is computed for it."""
    if Path(path).suffix not in FORMATS:
        raise ConfigError(f"--plot: found {path!r}, a name that ends in .png or .svg is expected", field="plot")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"--plot: there is no directory {str(Path(path).parent)!r}", field="plot")
    pyplot_module()


def draw(results: list[PolicyResult], title: str, path: str) -> None:
    """Writes the picture.

    Args:
        results: what came of the policies, in the order of the panels.
        title: over all of them.
        path: .png or .svg.

    Raises:
        ConfigError: the file cannot be written.
    """
    pyplot = pyplot_module()
    figure, panels = pyplot.subplots(
        len(results),
        1,
        figsize=(_INCHES[0], 1.0 + _INCHES[1] * len(results)),
        squeeze=False,
        layout="constrained",
        # Steps of one policy are not those of another.
        sharey=True,
    )
    for panel, result in zip(panels[:, 0], results, strict=True):
        steps, shares = thinned(result.recorder.columns()[: len(_KINDS)], result.recorder.slot_count)
        panel.stackplot(steps, shares, colors=[color for _, color in _KINDS], labels=[kind for kind, _ in _KINDS])
        (useful, *_), _ = result.recorder.means()
        panel.set_title(f"{result.policy}: {useful:.1%} of all slots hold tokens while requests wait", fontsize=10)
        panel.set_xlim(0, max(1, len(result.recorder)))
        panel.set_ylim(0, 1)
        panel.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    panels[-1, 0].set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"--plot: {error}", field="plot") from None
    finally:
        pyplot.close(figure)


def thinned(columns: npt.NDArray[np.int64], slot_count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns at most _POINTS (steps, shares of the pool): means over runs of steps of equal length.

    Args:
        columns: `[kind, step]` slots.
        slot_count: slots of the pool.
    """
    count = columns.shape[1]
    bounds = np.linspace(0, count, min(count, _POINTS) + 1).astype(np.int64)
    sums = np.concatenate((np.zeros((len(columns), 1)), columns.cumsum(axis=1)), axis=1)
    widths = np.maximum(1, np.diff(bounds))
    return (bounds[:-1] + bounds[1:]) / 2, np.diff(sums[:, bounds], axis=1) / widths / slot_count


def pyplot_module() -> Any:
    """Returns matplotlib's pyplot, which draws into files only; raises ConfigError if it is not installed."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - seconds to import, and needed for pictures alone
        from matplotlib import pyplot as plt  # noqa: PLC0415 - the same
    except ImportError:
        message = "--plot: needs matplotlib, which is not installed: pip install 'quire[plot]'"
        raise ConfigError(message, field="plot") from None
    mpl.use("agg")
    return plt
