"""Draws of one step for siblings: further tokens from rows that one token was drawn from."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from execsvc.gpu.launched import Reports
from execsvc.gpu.sampling import LOGPROBS, DeviceSampler
from execsvc.gpu.staging import Staging
from execsvc.sequences import Sequence, SequenceRows
from kernels.sampling.tensors import REPORT_WORDS
from kernels.step_state.tensors import PARAMETERS

_SEED = PARAMETERS.index("seed_low")

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class SiblingDraws:
    """Columns, a draw each, in the order of the places."""

    places: Ints
    """`[draw]`: place among those that sample of the sequence that brought the seed."""
    seeds: npt.NDArray[np.int32]
    """`[2, draw]`: low and high words."""
    positions: Ints
    """`[draw]`: index in its sequence of the token drawn."""

    @classmethod
    def take(cls, rows: SequenceRows, samplers: list[Sequence], row_ids: Ints) -> SiblingDraws | None:
        """Returns the draws that a step makes besides, None for none; the seeds are used up."""
        bringing = np.flatnonzero(rows.has_siblings[row_ids]).tolist()
        if not bringing:
            return None
        counts = [len(samplers[place].sibling_seeds) for place in bringing]
        seeds = np.array([seed for place in bringing for seed in samplers[place].sibling_seeds], dtype=np.uint64)
        words = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)]).astype(np.uint32).view(np.int32)
        for place in bringing:
            samplers[place].sibling_seeds = ()
        rows.has_siblings[row_ids[bringing]] = False
        places = np.repeat(bringing, counts)
        return cls(places, words, rows.known[row_ids[places]])

    def draw(
        self,
        sampler: DeviceSampler,
        staging: Staging,
        logits: torch.Tensor,
        changed: torch.Tensor,
        params: torch.Tensor,
        most: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws, and reports of what was drawn. Uses buffers of `staging`.

        Args:
            sampler: draws.
            staging: brings seeds to the device.
            logits: `[place, vocabulary]`, as the model gave them.
            changed: those that the places' own tokens were drawn from.
            params: `[parameter, place]` int32.
            most: rows that the sampler takes at once.

        Returns:
            `[draw]` int32 tokens, and `[draw, REPORT_WORDS]` int32 reports of those whose place has any.
        """
        count = len(self.places)
        tokens = torch.empty(count, dtype=torch.int32, device=logits.device)
        reports = torch.empty(count, REPORT_WORDS, dtype=torch.int32, device=logits.device)
        for first in range(0, count, most):
            part = slice(first, first + most)
            staging.begin()
            places, positions = staging.put(self.places[part]), staging.put(self.positions[part])
            low, high = staging.put(self.seeds[0, part]), staging.put(self.seeds[1, part])
            staging.send()
            mine = params.index_select(1, places)
            mine[_SEED], mine[_SEED + 1] = low, high
            sampler.sample(changed.index_select(0, places), mine, positions, tokens[part])
            sampler.report(logits.index_select(0, places), tokens[part], mine[LOGPROBS], reports[part])
        return tokens, reports

    def join(self, own: Reports, rows: SequenceRows, samplers: list[Sequence], row_ids: Ints) -> Reports:
        """Returns what is reported of the places and of the draws, which come back behind; each place's own first."""
        counts = rows.logprobs[row_ids[self.places]]
        reporting = np.flatnonzero(counts >= 0)
        tables = np.array([samplers[place].table for place in self.places[reporting].tolist()], dtype=np.int64)
        back = len(samplers) + reporting
        theirs = Reports(back, tables, self.positions[reporting], counts[reporting], -1 - back)
        by_place = np.argsort(np.concatenate([own.places, self.places[reporting]]), kind="stable")
        return Reports.joined([own, theirs]).ordered(by_place)
