"""The models that the connected executors serve."""

from __future__ import annotations

import dataclasses

from gateway.tokenize import ModelTokenizer
from protos.gateway.v1 import gateway_pb2 as pb


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as requests see it."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Longest sequence in tokens, prompt and completion together."""
    pool_token_count: int
    """Token slots of the whole pool of the executor that holds most."""
    eos_token_ids: frozenset[int]
    tokenizer: ModelTokenizer
    executor_ids: tuple[str, ...]
    default_sampling: pb.Sampling = dataclasses.field(default_factory=pb.Sampling)
    """What holds where a request does not say; never written to."""
    default_max_tokens: int | None = None
    """Most completion tokens where a request does not say; None for the gateway's own default alone."""

    def described(self) -> pb.Model:
        """Returns the model as it is listed."""
        return pb.Model(
            name=self.name,
            architecture=self.architecture,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            executor_ids=self.executor_ids,
            default_sampling=self.default_sampling,
            default_max_tokens=self.default_max_tokens,
        )
