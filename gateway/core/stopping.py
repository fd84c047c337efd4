"""When a sample ends, and why: by its last token, or by its length."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


class Stop(enum.Enum):
    """Why a sample ends, but for a stop string, which is a matter of text."""

    EOS = enum.auto()
    """The model's end-of-sequence token."""
    STOP_TOKEN = enum.auto()
    """A stop token of the request."""
    CONTEXT = enum.auto()
    """The sequence is as long as the model takes."""
    LENGTH = enum.auto()
    """It has all tokens that were asked for."""


def may_stop(sequence: Sequence) -> bool:
    """Returns whether the sequence's last token may end it: `min_tokens` others have to come before."""
    return sequence.completion_length > sequence.request.settings.min_tokens


def stop_by_token(sequence: Sequence) -> Stop | None:
    """Returns why the sequence's last token ends it, if it does."""
    settings = sequence.request.settings
    token = sequence.tokens[-1]
    if token in settings.eos_token_ids:
        stop = Stop.EOS
    elif token in settings.stop_token_ids:
        stop = Stop.STOP_TOKEN
    else:
        return None
    return stop if may_stop(sequence) else None


def stop_by_length(sequence: Sequence) -> Stop | None:
    """Returns why the sequence's length ends it, if it does."""
    length = len(sequence.tokens)
    if length >= sequence.request.max_model_len:
        return Stop.CONTEXT
    return Stop.LENGTH if length >= sequence.length_limit else None


def certain_tokens(sequence: Sequence) -> int:
    """Returns how many more tokens the sequence will have at least, unless its client leaves."""
    settings = sequence.request.settings
    if settings.eos_token_ids or settings.stop_token_ids or settings.stop:
        return max(0, sequence.prompt_length + settings.min_tokens - len(sequence.tokens))
    return sequence.length_limit - len(sequence.tokens)


def withheld_tokens(sequence: Sequence) -> tuple[list[int], int]:
    """Returns the tokens that must not be sampled yet, and the position from which they may; ([], 0) for none."""
    settings = sequence.request.settings
    if not settings.min_tokens:
        return [], 0
    tokens = sorted(settings.eos_token_ids | settings.stop_token_ids)
    return tokens, sequence.prompt_length + settings.min_tokens if tokens else 0
