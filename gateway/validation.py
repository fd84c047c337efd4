"""From a GenerationSpec to checked settings: every field named, what was found, what is allowed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
import dataclasses
import re
import secrets
from typing import Final

from gateway.config import GatewayConfig
from gateway.constraint import check_constraint
from gateway.core.request import RequestSettings
from gateway.models import ServedModel
from gateway.refusal import refusal
from gateway.sampling_options import check_beam, check_output, check_sample_counts, check_sampling, with_defaults
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import InvalidRequestError, PromptTooLongError

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_STOP_TOKENS: Final = 64
MAX_CHAT_MESSAGES: Final = 4_096
MAX_SALT_CHARACTERS: Final = 256
_TOKEN_CHARACTERS: Final = 256
"""No token of any vocabulary is longer."""
_ROLES: Final = ("system", "user", "assistant")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_request_id(request_id: str) -> str:
    """Returns the request's id, drawn at random if empty.

    Raises:
        InvalidRequestError: too long, or a character that is not allowed.
    """
    if not request_id:
        return secrets.token_hex(8)
    if _REQUEST_ID.fullmatch(request_id) is None:
        raise refusal("request_id", repr(request_id[:140]), "1 .. 128 characters of A-Z a-z 0-9 . _ : -")
    return request_id


def _check_stopping(stopping: pb.Stopping, vocab_size: int) -> tuple[tuple[str, ...], frozenset[int]]:
    """Returns stop strings and stop tokens; raises InvalidRequestError."""
    if len(stopping.stop) > MAX_STOP_STRINGS:
        raise refusal("stopping.stop", f"{len(stopping.stop)} strings", f"at most {MAX_STOP_STRINGS}")
    for index, text in enumerate(stopping.stop):
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise refusal(f"stopping.stop[{index}]", f"{len(text)} characters", f"1 .. {MAX_STOP_CHARACTERS}")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        raise refusal("stopping.stop_token_ids", f"{len(stopping.stop_token_ids)} ids", f"at most {MAX_STOP_TOKENS}")
    for index, token in enumerate(stopping.stop_token_ids):
        if token >= vocab_size:
            raise refusal(f"stopping.stop_token_ids[{index}]", token, f"0 .. {vocab_size - 1}")
    return tuple(stopping.stop), frozenset(stopping.stop_token_ids)


def chat_messages(chat: pb.Chat) -> list[Mapping[str, str]]:
    """Returns the messages of a conversation.

    Raises:
        InvalidRequestError: no message, too many, or an unknown role.
    """
    if not 1 <= len(chat.messages) <= MAX_CHAT_MESSAGES:
        raise refusal("chat.messages", f"{len(chat.messages)} messages", f"1 .. {MAX_CHAT_MESSAGES}")
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            raise refusal(f"chat.messages[{index}].role", repr(message.role[:64]), ", ".join(_ROLES))
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def check_text_length(field: str, character_count: int, model: ServedModel) -> None:
    """Refuses a text, before it is tokenised, that is far longer than any that the model could hold.

    Raises:
        PromptTooLongError: it is.
    """
    if character_count > model.max_model_len * _TOKEN_CHARACTERS:
        message = (
            f"{field}: {character_count} characters, the model's context of {model.max_model_len} tokens cannot hold it"
        )
        raise PromptTooLongError(message, field=field)


async def encode_prompt(spec: pb.GenerationSpec | pb.CountTokensRequest, model: ServedModel) -> array[int]:
    """Returns the tokens of the prompt.

    Raises:
        InvalidRequestError: no prompt, an empty one, or a token outside the vocabulary.
        PromptTooLongError: more characters or tokens than could ever fit.
    """
    kind = spec.WhichOneof("prompt")
    if kind == "text":
        check_text_length("text", len(spec.text), model)
        tokens = await model.tokenizer.encode_text(spec.text) if spec.text else array("I")
    elif kind == "chat":
        messages = chat_messages(spec.chat)
        check_text_length("chat", sum(len(message["content"]) for message in messages), model)
        tokens = await model.tokenizer.encode_chat(messages)
    elif kind == "token_ids" and isinstance(spec, pb.GenerationSpec):
        tokens = array("I", spec.token_ids.ids)
        if tokens and max(tokens) >= model.vocab_size:
            raise refusal("token_ids.ids", max(tokens), f"0 .. {model.vocab_size - 1}")
    else:
        raise InvalidRequestError(
            "prompt: none given; set text, token_ids or chat", field="prompt", reason="EMPTY_PROMPT"
        )
    if not tokens:
        raise InvalidRequestError(f"{kind}: the prompt is empty", field=kind, reason="EMPTY_PROMPT")
    return tokens


def _check_lengths(prompt: array[int], stopping: pb.Stopping, model: ServedModel, default_max_tokens: int) -> int:
    """Returns max_tokens; raises PromptTooLongError or InvalidRequestError."""
    length, context, pool = len(prompt), model.max_model_len, model.pool_token_count
    figures = {"prompt_token_count": length, "max_model_len": context, "pool_token_count": pool}
    if length >= context:
        message = (
            f"prompt: {length} tokens, allowed are at most {context - 1} (max_model_len {context} less one to generate)"
        )
        raise PromptTooLongError(message, field="prompt", metadata=figures)
    if length >= pool:
        message = f"prompt: {length} tokens, the whole pool holds {pool}: it can never run here"
        raise PromptTooLongError(message, field="prompt", metadata=figures)
    room = min(context, pool) - length
    if not stopping.HasField("max_tokens"):
        return min(room, default_max_tokens, model.default_max_tokens or room)
    if not 1 <= stopping.max_tokens <= room:
        allowed = f"1 .. {room} (prompt {length} tokens, max_model_len {context}, pool {pool})"
        raise refusal("stopping.max_tokens", stopping.max_tokens, allowed)
    return stopping.max_tokens


def _check_scheduling(scheduling: pb.Scheduling, max_queue_time: float, *, priorities: bool) -> tuple[float, int]:
    """Returns seconds in the queue and priority; raises InvalidRequestError."""
    if scheduling.priority and not priorities:
        allowed = "0: this gateway serves in order of arrival (--scheduling-policy fcfs)"
        raise refusal("scheduling.priority", scheduling.priority, allowed)
    if not scheduling.HasField("max_queue_time"):
        return max_queue_time, scheduling.priority
    asked = scheduling.max_queue_time.ToNanoseconds() / 1e9
    if asked <= 0:
        raise refusal("scheduling.max_queue_time", f"{asked} s", "more than 0")
    return min(max_queue_time, asked), scheduling.priority


def _check_time_limit(scheduling: pb.Scheduling) -> float:
    """Returns the time limit in seconds, 0 for none; raises InvalidRequestError."""
    if not scheduling.HasField("time_limit"):
        return 0.0
    limit = scheduling.time_limit.ToNanoseconds() / 1e9
    if limit <= 0:
        raise refusal("scheduling.time_limit", f"{limit} s", "more than 0")
    return limit


async def check_for(
    config: GatewayConfig, spec: pb.GenerationSpec, model: ServedModel, prompt: array[int] | None = None
) -> RequestSettings:
    """Returns the settings of a request to a gateway with this configuration; see `check_spec`."""
    return await check_spec(
        spec,
        model,
        max_tokens_default=config.max_tokens_default,
        max_queue_time=config.max_queue_time,
        caching=config.enable_prefix_caching,
        priorities=config.scheduling_policy == "priority",
        prompt=prompt,
    )


async def check_spec(
    spec: pb.GenerationSpec,
    model: ServedModel,
    *,
    max_tokens_default: int,
    max_queue_time: float,
    caching: bool,
    priorities: bool = False,
    prompt: array[int] | None = None,
) -> RequestSettings:
    """Returns the settings of a request.

    Args:
        spec: what the client sent.
        model: the model that it names.
        max_tokens_default: completion tokens if the request does not say.
        max_queue_time: most seconds in the queue, also if the request asks for more.
        caching: whether the prefix cache is on.
        priorities: whether requests may have priorities.
        prompt: tokens to continue instead of those of `spec`.

    Raises:
        InvalidRequestError: the first field that is wrong.
        PromptTooLongError: the prompt can never run.
    """
    request_id = check_request_id(spec.request_id)
    sampling = check_sampling(with_defaults(spec.sampling, model.default_sampling), model.vocab_size)
    answer_count, sample_count = check_sample_counts(spec.sampling)
    logprobs, prompt_logprobs = check_output(spec.output)
    ends = frozenset() if spec.stopping.ignore_eos else model.eos_token_ids
    beam = check_beam(spec, answer_count, len(ends))
    if beam is not None:
        sampling, sample_count = dataclasses.replace(sampling, temperature=0.0), 1
    grammar = await check_constraint(spec)
    stop, stop_token_ids = _check_stopping(spec.stopping, model.vocab_size)
    if len(spec.caching.salt) > MAX_SALT_CHARACTERS:
        found = f"{len(spec.caching.salt)} characters"
        raise refusal("caching.salt", found, f"at most {MAX_SALT_CHARACTERS}")
    queue_time, priority = _check_scheduling(spec.scheduling, max_queue_time, priorities=priorities)
    time_limit = _check_time_limit(spec.scheduling)
    if prompt is None:
        prompt = await encode_prompt(spec, model)
    max_tokens = _check_lengths(prompt, spec.stopping, model, max_tokens_default)
    if spec.stopping.min_tokens > max_tokens:
        raise refusal("stopping.min_tokens", spec.stopping.min_tokens, f"0 .. {max_tokens} (max_tokens)")
    return RequestSettings(
        request_id=request_id,
        model=model.name,
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=spec.stopping.min_tokens,
        sampling=sampling,
        sample_count=sample_count,
        answer_count=answer_count,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        echo=spec.output.echo,
        grammar=grammar,
        include_stop_str=spec.stopping.include_stop_str_in_output,
        stop=stop,
        stop_token_ids=stop_token_ids,
        eos_token_ids=ends,
        beam=beam,
        cache_salt=spec.caching.salt,
        skip_cache_read=spec.caching.skip_read or not caching,
        skip_cache_write=spec.caching.skip_write or not caching,
        max_queue_time=queue_time,
        time_limit=time_limit,
        priority=priority,
    )
