"""Log-probabilities of tokens, as clients get them."""

from collections.abc import Iterable
import dataclasses

from protos.gateway.v1 import gateway_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token that could have come."""

    token_id: int
    text: str
    logprob: float
    """Natural logarithm of its probability."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that came, before penalties, bias and temperature."""

    token_id: int
    text: str
    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """One more than how many tokens were more likely."""
    top: tuple[LikelyToken, ...]
    """The most likely tokens, as many as were asked for."""


def logprobs_from(wire: Iterable[gateway_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Returns the log-probabilities of tokens."""
    return tuple(
        TokenLogprob(
            token.token_id,
            token.text,
            token.logprob,
            token.rank,
            tuple(LikelyToken(likely.token_id, likely.text, likely.logprob) for likely in token.top),
        )
        for token in wire
    )
