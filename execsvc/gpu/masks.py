"""Grammars on the device: a bit for each token that may come next, for the sequences that have a grammar.

A mask needs the sequence's last token, which only the device has while its step is in flight. So the forward pass of
the next step is launched first: the host waits for the last step's tokens and makes masks while the device computes.
"""

from __future__ import annotations

import numpy as np

from execsvc.gpu.runtime import Runtime
from execsvc.gpu.staging import Staging, Words
from execsvc.sequences import Sequence
from quire.units import div_ceil, round_up

_DEPTH = 2
_ALIGNMENT = 4


class GrammarMasks:
    """Masks of the sequences of a step, at one address for all steps."""

    def __init__(self, runtime: Runtime, row_count: int, vocab_size: int) -> None:
        """Makes room for `row_count` masks over a vocabulary."""
        self._width = round_up(div_ceil(vocab_size, 32), _ALIGNMENT)
        self._row_count = round_up(row_count, _ALIGNMENT)
        self._staging = Staging(runtime, self._row_count * (1 + self._width), _DEPTH)
        self.places = self._staging.words[:row_count]
        """`[place]` int32: which mask restricts the place; -1 for none."""
        self.masks = self._staging.words[self._row_count :].view(self._row_count, self._width)
        """`[mask, word]` int32."""
        self.places.fill_(-1)
        self._any = False

    def send(self, sequences: list[Sequence], constrained: list[int]) -> None:
        """Brings the masks of a step to the device; waits for the tokens that they depend on.

        Args:
            sequences: those that sample, in the order of their places.
            constrained: places of those with a grammar.
        """
        if not constrained:
            if self._any:
                self.places.fill_(-1)
                self._any = False
            return
        masks: list[Words] = []
        places = np.full(self._row_count, -1)
        for place in constrained:
            mask = _next_mask(sequences[place])
            if mask is not None:
                places[place] = len(masks)
                masks.append(mask)
        self._any = True
        self._staging.begin()
        self._staging.put(places)
        for mask in masks:
            self._staging.put(mask, self._width)
        self._staging.send()


def _next_mask(sequence: Sequence) -> Words | None:
    """Returns the mask of a sequence's next token, None if any may come."""
    matcher = sequence.matcher
    assert matcher is not None, "only sequences with a grammar are asked for"
    for read in sequence.unread:
        token = read()
        if token >= 0:
            matcher.advance(token)
    sequence.unread.clear()
    return matcher.bitmask()
