"""Which tokens a grammar allows next.

The mask is made where tokens are sampled: here the last token is known first, and no step has to wait for the gateway.
The rules of grammars are those of `llguidance`.
"""

from __future__ import annotations

from collections.abc import Iterable

import llguidance
import numpy as np
import numpy.typing as npt

from quire.errors import InvalidRequestError

Allowed = npt.NDArray[np.bool_]


class Matcher:
    """How far one sequence is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def bitmask(self) -> npt.NDArray[np.int32] | None:
        """Returns a bit for each token, the lowest first, 1 if it may come next; None for any: it has ended."""
        if self._matcher.is_stopped() and self._matcher.stop_reason() == "EndOfSentence":
            return None
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)

    def allowed(self) -> Allowed | None:
        """Returns which tokens may come next, `[vocabulary]`; None for any."""
        mask = self.bitmask()
        if mask is None:
            return None
        return np.unpackbits(mask.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)

    def advance(self, token: int) -> None:
        """Takes the token that came. One that was not allowed ends the grammar: a step in flight behind the last."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Makes matchers for the tokens of one model.

    Args:
        tokenizer_json: in the format of Hugging Face `tokenizers`.
        vocab_size: number of token ids of the model.
        eos_token_ids: tokens that end a completion; they are allowed where a grammar may end.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None

    def matcher(self, grammar: str, said: Iterable[int]) -> Matcher:
        """Returns a matcher behind the tokens that were generated so far.

        Raises:
            InvalidRequestError: the grammar is none, or the tokens are not of it.
        """
        if self._tokenizer is None:
            # It takes a moment, and few requests need it.
            self._tokenizer = llguidance.LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=self._eos or None)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            message = f"grammar: {matcher.get_error().splitlines()[0]}"
            raise InvalidRequestError(message, field="grammar", reason="INVALID_GRAMMAR")
        tokens = list(said)
        if tokens and not matcher.consume_tokens(tokens):
            raise InvalidRequestError("grammar: the tokens generated so far are not of it", field="grammar")
        return Matcher(matcher, self._vocab_size)
