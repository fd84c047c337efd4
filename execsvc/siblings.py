"""First tokens of further samples of a prompt: drawn from the same logits, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence as Rows
import dataclasses

import torch

from execsvc.sampler import sample
from execsvc.sequences import Sequence

Siblings = dict[int, list[int]]
"""Tokens drawn with the sibling seeds of a sequence, by its place among those that sample; -1 as in `sample`."""


def sample_siblings(logits: torch.Tensor, samplers: list[Sequence], positions: Rows[int]) -> Siblings:
    """Draws with the sibling seeds of `samplers` and clears these.

    Args:
        logits: `[sampler, vocabulary]`.
        samplers: sequences that sample.
        positions: of the tokens drawn, a sampler each.
    """
    places = [place for place, sequence in enumerate(samplers) for _ in sequence.sibling_seeds]
    if not places:
        return {}
    specs = []
    for sequence in samplers:
        specs += [dataclasses.replace(sequence.sampling, seed=seed) for seed in sequence.sibling_seeds]
        sequence.sibling_seeds = ()
    siblings: Siblings = {}
    for place, token in zip(places, sample(logits[places], specs, [positions[place] for place in places]), strict=True):
        siblings.setdefault(place, []).append(token)
    return siblings
