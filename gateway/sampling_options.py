"""How tokens are chosen and what is answered of them, as clients ask for it: checked, with every default filled in."""

from __future__ import annotations

import math
import secrets
from typing import Final, Literal

from gateway.core.beam import BeamSettings
from gateway.core.request import SamplingSettings
from gateway.refusal import refusal
from protos.execsvc.v1 import execsvc_pb2
from protos.gateway.v1 import gateway_pb2 as pb

MAX_TEMPERATURE: Final = 100.0
MAX_SAMPLES: Final = 64
MAX_REPETITION_PENALTY: Final = 100.0
MAX_PENALTY: Final = 2.0
MAX_BIASED_TOKENS: Final = 1_024
MAX_BIAS: Final = 100.0
MAX_LOGPROBS: Final = 20
_MAX_POWER: Final = 10.0
_WITH_DEFAULTS: Final[tuple[Literal["temperature", "top_k", "top_p", "min_p", "repetition_penalty"], ...]] = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)
_NOT_IN_A_SEARCH: Final = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "best_of"),
)


def _within(field: str, value: float, allowed: str, *, inside: bool) -> float:
    """Returns a value that is finite and `inside` its range.

    Raises:
        InvalidRequestError: it is not.
    """
    if not (math.isfinite(value) and inside):
        raise refusal(f"sampling.{field}", value, allowed)
    return value


def _share(sampling: pb.Sampling, field: str) -> float:
    """Returns a probability, 1 if it is not set; raises InvalidRequestError."""
    value: float = getattr(sampling, field) if sampling.HasField(field) else 1.0  # type: ignore[arg-type]
    return _within(field, value, "greater than 0, at most 1", inside=0 < value <= 1)


def default_sampling(described: execsvc_pb2.DefaultSampling) -> pb.Sampling:
    """Returns what an executor says of requests that do not say, in the words of requests."""
    defaults = pb.Sampling()
    for field in _WITH_DEFAULTS:
        if described.HasField(field):
            setattr(defaults, field, getattr(described, field))
    return defaults


def with_defaults(sampling: pb.Sampling, defaults: pb.Sampling) -> pb.Sampling:
    """Returns what a request says, and the model's defaults where it does not. A beam search has none of them."""
    if sampling.HasField("beam_width"):
        return sampling
    merged = pb.Sampling()
    merged.CopyFrom(defaults)
    merged.MergeFrom(sampling)
    return merged


def check_sampling(sampling: pb.Sampling, vocab_size: int) -> SamplingSettings:
    """Returns the sampling settings.

    Raises:
        InvalidRequestError: a value out of range, NaN or infinite.
    """
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    allowed = f"0 (greedy) .. {MAX_TEMPERATURE:g}"
    _within("temperature", temperature, allowed, inside=0 <= temperature <= MAX_TEMPERATURE)
    _within("min_p", sampling.min_p, "0 .. 1", inside=0 <= sampling.min_p <= 1)
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    allowed = f"greater than 0, at most {MAX_REPETITION_PENALTY:g}"
    _within("repetition_penalty", repetition, allowed, inside=0 < repetition <= MAX_REPETITION_PENALTY)
    for field in ("presence_penalty", "frequency_penalty"):
        value: float = getattr(sampling, field)
        _within(field, value, f"-{MAX_PENALTY:g} .. {MAX_PENALTY:g}", inside=-MAX_PENALTY <= value <= MAX_PENALTY)
    return SamplingSettings(
        temperature=temperature,
        top_k=sampling.top_k,
        top_p=_share(sampling, "top_p"),
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        typical_p=_share(sampling, "typical_p"),
        repetition_penalty=repetition,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=_check_bias(sampling, vocab_size),
    )


def _check_bias(sampling: pb.Sampling, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Returns what is added to logits, by token; raises InvalidRequestError."""
    if len(sampling.logit_bias) > MAX_BIASED_TOKENS:
        raise refusal("sampling.logit_bias", f"{len(sampling.logit_bias)} tokens", f"at most {MAX_BIASED_TOKENS}")
    for token, value in sampling.logit_bias.items():
        if token >= vocab_size:
            raise refusal("sampling.logit_bias", f"token {token}", f"tokens 0 .. {vocab_size - 1}")
        allowed = f"-{MAX_BIAS:g} .. {MAX_BIAS:g}"
        _within(f"logit_bias[{token}]", value, allowed, inside=-MAX_BIAS <= value <= MAX_BIAS)
    return tuple(sorted(sampling.logit_bias.items()))


def check_sample_counts(sampling: pb.Sampling) -> tuple[int, int]:
    """Returns how many samples are answered and how many are generated.

    Raises:
        InvalidRequestError: a count is out of range.
    """
    answered = sampling.n if sampling.HasField("n") else 1
    if not 1 <= answered <= MAX_SAMPLES:
        raise refusal("sampling.n", answered, f"1 .. {MAX_SAMPLES}")
    generated = sampling.best_of if sampling.HasField("best_of") else answered
    if not answered <= generated <= MAX_SAMPLES:
        raise refusal("sampling.best_of", generated, f"{answered} (n) .. {MAX_SAMPLES}")
    return answered, generated


def check_output(output: pb.Output) -> tuple[int | None, int | None]:
    """Returns how many log-probabilities are answered for each token of the completion and of the prompt.

    Raises:
        InvalidRequestError: a count is out of range.
    """
    for field in ("logprobs", "prompt_logprobs"):
        if getattr(output, field) > MAX_LOGPROBS:
            raise refusal(f"output.{field}", getattr(output, field), f"0 .. {MAX_LOGPROBS}")
    return (
        output.logprobs if output.HasField("logprobs") else None,
        output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
    )


def check_beam(spec: pb.GenerationSpec, answer_count: int, end_count: int) -> BeamSettings | None:
    """Returns what a beam search is to find, None for none.

    Args:
        spec: the request.
        answer_count: completions that are answered.
        end_count: tokens that end a completion.

    Raises:
        InvalidRequestError: a value out of range, or an option that a search does not have.
    """
    sampling = spec.sampling
    if not sampling.HasField("beam_width"):
        for field in ("length_penalty", "early_stopping"):
            if getattr(sampling, field):
                raise refusal(f"sampling.{field}", getattr(sampling, field), "nothing without beam_width")
        return None
    penalty = sampling.length_penalty if sampling.HasField("length_penalty") else 1.0
    _within(
        "length_penalty", penalty, f"-{_MAX_POWER:g} .. {_MAX_POWER:g}", inside=-_MAX_POWER <= penalty <= _MAX_POWER
    )
    for message, prefix, fields in (
        (sampling, "sampling", _NOT_IN_A_SEARCH),
        (spec.stopping, "stopping", ("stop", "stop_token_ids", "min_tokens", "include_stop_str_in_output")),
        (spec.output, "output", ("logprobs", "prompt_logprobs", "echo")),
    ):
        for field in fields:
            if getattr(message, field):
                raise refusal(f"{prefix}.{field}", getattr(message, field), "nothing together with beam_width")
    if spec.constraint.WhichOneof("kind"):
        raise refusal("constraint", spec.constraint.WhichOneof("kind"), "nothing together with beam_width")
    settings = BeamSettings(sampling.beam_width, penalty, sampling.early_stopping)
    most = MAX_LOGPROBS // BeamSettings(1).candidate_count(end_count)
    if not answer_count <= settings.width <= most:
        raise refusal("sampling.beam_width", settings.width, f"{answer_count} (n) .. {most}")
    return settings
