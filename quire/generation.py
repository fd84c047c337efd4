"""What a client asks for and gets back: frozen dataclasses, and their translation from and to the wire."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import datetime as dt
import difflib
import enum
import json
import secrets
from typing import Any, TypeAlias, TypedDict

from google.protobuf import duration_pb2

from protos.gateway.v1 import gateway_pb2
from quire.errors import InvalidRequestError
from quire.logprobs import TokenLogprob, logprobs_from


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    """What was said."""


Messages: TypeAlias = Sequence[Message | Mapping[str, str]]
Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids that are taken as they are."""


class Options(TypedDict, total=False):
    """How to generate; everything may be left out, then the server's default holds."""

    model: str
    """Name of the model; not needed when only one is served."""
    request_id: str
    """Up to 128 characters of `[A-Za-z0-9._:-]`; drawn at random if not given. Repeating a live one is refused."""
    max_tokens: int
    """Tokens to generate at most."""
    min_tokens: int
    """Tokens to generate at least: until then nothing but `max_tokens` ends a sample."""
    temperature: float
    """0 is greedy; 0 .. 100; default 1."""
    top_k: int
    """Keep this many most likely tokens; 0 keeps all."""
    top_p: float
    """Keep the most likely tokens whose probabilities reach this sum; 0 < p <= 1."""
    min_p: float
    """Drop tokens less likely than this times the most likely one; 0 .. 1."""
    seed: int
    """Same seed, same text, whatever else runs."""
    n: int
    """Samples of the same prompt; 1 .. 64."""
    best_of: int
    """Samples to generate, of which the `n` most likely are answered; n .. 64."""
    beam_width: int
    """Search for the most likely completions with this many beams instead of sampling."""
    length_penalty: float
    """Of a search: longer completions are worth more above 0; default 1."""
    early_stopping: bool
    """End a search as soon as `beam_width` completions have ended."""
    typical_p: float
    """Keep the tokens of nearly the expected surprise whose probabilities reach this sum; 0 < p <= 1."""
    repetition_penalty: float
    """Makes tokens that are in the prompt or the completion less likely, if more than 1."""
    presence_penalty: float
    """Subtracted from the logits of tokens that were generated; -2 .. 2."""
    frequency_penalty: float
    """Subtracted from a token's logit for each time it was generated; -2 .. 2."""
    logit_bias: Mapping[int, float]
    """Added to the logits of tokens, by token id; -100 .. 100."""
    guided_json: str | Mapping[str, object]
    """JSON schema that the completion must be a document of."""
    guided_regex: str
    """Regular expression that must match the whole completion."""
    guided_choice: Sequence[str]
    """Texts of which the completion must be one."""
    guided_grammar: str
    """Lark grammar of the completion, from its rule `start` on."""
    logprobs: int
    """Answer the log-probability of each token, and of this many most likely ones; 0 .. 20."""
    prompt_logprobs: int
    """The same for the tokens of the prompt, from the second on."""
    echo: bool
    """Begin the text of each sample with that of the prompt."""
    stop: Sequence[str]
    """Strings that end a sample; not part of its text."""
    stop_token_ids: Sequence[int]
    """Token ids that end a sample."""
    include_stop_str_in_output: bool
    """Let the text end with what ended the sample."""
    ignore_eos: bool
    """Go on after the model's end-of-sequence token."""
    max_queue_time: float
    """Seconds in the server's queue after which the request fails with QUEUE_TIMEOUT."""
    time_limit: float
    """Seconds from arrival after which the request ends with what it has; none if not given."""
    priority: int
    """Lower goes first, where the server goes by priorities; 0 if not given."""
    cache_salt: str
    """Requests with different salts share no cached block."""
    skip_cache_read: bool
    """Compute the whole prompt even if it is cached."""
    skip_cache_write: bool
    """Leave nothing of this request in the cache."""


class FinishReason(enum.Enum):
    """Why a sample ended."""

    EOS = "eos"
    """The model's end-of-sequence token."""
    STOP = "stop"
    """A stop string or stop token of the request."""
    LENGTH = "length"
    """`max_tokens` reached."""
    CONTEXT = "context"
    """The longest sequence that the model takes."""
    CANCELLED = "cancelled"
    """Another call cancelled the request."""
    TIME_LIMIT = "time_limit"
    """`time_limit` passed; what was generated until then is there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. Times in seconds, from arrival at the gateway."""

    prompt_token_count: int
    cached_token_count: int
    """Prompt tokens that were found in the prefix cache."""
    completion_token_count: int
    """Tokens generated, all samples together."""
    preemption_count: int
    """Times that a sample lost its blocks, and was computed again or moved back from host memory."""
    peak_block_count: int
    """Most blocks that the request's tables named at one time."""
    queue_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    stored_token_count: int = 0
    """Tokens of the blocks that the samples filled and left in the prefix cache."""
    shared_block_count: int = 0
    """Blocks that the samples found in the cache, or shared with the first one, when they began."""
    block_seconds: float = 0.0
    """Blocks held times seconds, from admission to the last token."""
    recomputed_token_count: int = 0
    """Tokens computed again because a sample had lost its blocks."""
    swap_count: int = 0
    """Of `preemption_count`, those after which a sample's keys and values were in host memory."""
    swapped_block_count: int = 0
    """Blocks that were moved to host memory, and back, each way counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Admitted:
    """First event of a stream: the request has left the queue."""

    request_id: str
    prompt_token_count: int
    cached_token_count: int
    queue_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """New text of one sample."""

    index: int
    """Which sample, 0 .. n - 1."""
    text: str
    """Whole characters; may be empty on the last delta."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    """Set on the last delta of the sample."""
    stop: str | int | None = None
    """Stop string or stop token that matched."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Beside `token_ids`, if asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt, if asked for, before the first delta."""

    tokens: tuple[TokenLogprob, ...]
    """The tokens of the prompt but for the first one, which follows nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream."""

    usage: Usage


Event: TypeAlias = Admitted | PromptLogprobs | Delta | Finished


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One whole sample."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | int | None = None
    """Stop string or stop token that matched."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Beside `token_ids`, if asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to a request. `text`, `token_ids` and `finish_reason` are those of its first sample."""

    request_id: str
    completions: tuple[Completion, ...]
    """The samples, by index; at least one."""
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Those of the prompt but for its first token, if asked for."""

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first sample."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.completions[0].finish_reason


@dataclasses.dataclass(frozen=True, slots=True)
class TokenCount:
    """A prompt in tokens."""

    token_count: int
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A model that is served."""

    name: str
    architecture: str
    max_model_len: int
    """Longest sequence in tokens, prompt and completion together."""
    vocab_size: int
    executor_ids: tuple[str, ...]
    default_sampling: Mapping[str, float]
    """Sampling parameters of requests that do not give them, by name: what the model brings or its operator has set."""
    default_max_tokens: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Cancellation:
    """What became of requests that were to be cancelled."""

    cancelled: tuple[str, ...]
    """Were live; their blocks are back in the pool."""
    unknown: tuple[str, ...]
    """Were not live."""


def _check_names(options: Mapping[str, object]) -> None:
    """Raises TypeError for a keyword that is no option, with the nearest one that is."""
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            message = f"{name!r} is not an option of a request{advice}"
            raise TypeError(message)


def _chat(messages: Messages) -> gateway_pb2.Chat:
    """Returns a conversation for the wire."""
    turns = []
    for index, message in enumerate(messages):
        if isinstance(message, Message):
            turns.append(gateway_pb2.ChatMessage(role=message.role, content=message.content))
        elif set(message) == {"role", "content"}:
            turns.append(gateway_pb2.ChatMessage(role=message["role"], content=message["content"]))
        else:
            text = f"messages[{index}]: {message!r} is neither a Message nor a mapping with role and content"
            raise InvalidRequestError(text, field="messages")
    return gateway_pb2.Chat(messages=turns)


_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "best_of",
    "beam_width",
    "length_penalty",
    "early_stopping",
)


def new_request_id() -> str:
    """Returns a fresh name for a request: 64 random bits, short enough to be read in a table."""
    return secrets.token_hex(8)


def specification(
    prompt: Prompt | None, messages: Messages | None, options: Mapping[str, Any]
) -> gateway_pb2.GenerationSpec:
    """Returns the request for `prompt` or `messages`, whichever is given, if one is.

    Ranges are the server's to check; only what cannot be put on the wire is refused here.

    Raises:
        InvalidRequestError: a value does not fit its field.
        TypeError: an unknown option.
    """
    _check_names(options)
    spec = gateway_pb2.GenerationSpec()
    try:
        if messages is not None:
            spec.chat.CopyFrom(_chat(messages))
        elif isinstance(prompt, str):
            spec.text = prompt
        elif prompt is not None:
            spec.token_ids.SetInParent()
            spec.token_ids.ids.extend(prompt)
        spec.request_id = options.get("request_id") or new_request_id()
        spec.model = options.get("model", "")
        _set(spec.sampling, options, _SAMPLING)
        spec.sampling.logit_bias.update(options.get("logit_bias") or {})
        _set(spec.stopping, options, ("max_tokens", "min_tokens", "ignore_eos", "include_stop_str_in_output"))
        _constrain(spec.constraint, options)
        _set(spec.output, options, ("logprobs", "prompt_logprobs", "echo"))
        spec.stopping.stop.extend(_texts(options.get("stop", ())))
        spec.stopping.stop_token_ids.extend(options.get("stop_token_ids", ()))
        if options.get("max_queue_time") is not None:
            spec.scheduling.max_queue_time.FromTimedelta(dt.timedelta(seconds=options["max_queue_time"]))
        if options.get("time_limit") is not None:
            spec.scheduling.time_limit.FromTimedelta(dt.timedelta(seconds=options["time_limit"]))
        _set(spec.scheduling, options, ("priority",))
        spec.caching.salt = options.get("cache_salt", "")
        spec.caching.skip_read = options.get("skip_cache_read", False)
        spec.caching.skip_write = options.get("skip_cache_write", False)
    except (TypeError, ValueError, OverflowError) as error:
        message = f"a value does not fit its field: {error}"
        raise InvalidRequestError(message) from error
    return spec


def _constrain(constraint: gateway_pb2.Constraint, options: Mapping[str, Any]) -> None:
    """Sets what a completion must look like; raises InvalidRequestError if there is more than one thing."""
    given = [name for name in options if name.startswith("guided_") and options[name] is not None]
    if len(given) > 1:
        message = f"{' and '.join(given)}: found {len(given)} constraints, allowed is one"
        raise InvalidRequestError(message, field=given[1])
    for name in given:
        value = options[name]
        if name == "guided_json":
            constraint.json_schema = value if isinstance(value, str) else json.dumps(value)
        elif name == "guided_choice":
            constraint.choice.SetInParent()
            constraint.choice.texts.extend(_texts(value))
        else:
            setattr(constraint, name.removeprefix("guided_"), value)


def _set(target: Any, options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Sets the fields of `target` that `options` has a value for."""
    for name in names:
        value = options.get(name)
        if value is not None:
            try:
                setattr(target, name, value)
            except (TypeError, ValueError) as error:
                message = f"{name}: {value!r} does not fit: {error}"
                raise InvalidRequestError(message, field=name) from error


def _texts(stop: str | Sequence[str]) -> Sequence[str]:
    """Returns stop strings; a lone string is one of them, not its characters."""
    return [stop] if isinstance(stop, str) else stop


def count_request(prompt: str | Messages, model: str) -> gateway_pb2.CountTokensRequest:
    """Returns the request that counts the tokens of a text or a conversation."""
    if isinstance(prompt, str):
        return gateway_pb2.CountTokensRequest(model=model, text=prompt)
    return gateway_pb2.CountTokensRequest(model=model, chat=_chat(prompt))


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def usage_from(wire: gateway_pb2.Usage) -> Usage:
    """Returns what a request cost."""
    return Usage(
        prompt_token_count=wire.prompt_token_count,
        cached_token_count=wire.cached_token_count,
        completion_token_count=wire.completion_token_count,
        preemption_count=wire.preemption_count,
        peak_block_count=wire.peak_block_count,
        queue_seconds=_seconds(wire.queue_time),
        time_to_first_token_seconds=_seconds(wire.time_to_first_token),
        total_seconds=_seconds(wire.total_time),
        stored_token_count=wire.stored_token_count,
        shared_block_count=wire.shared_block_count,
        block_seconds=wire.block_seconds,
        recomputed_token_count=wire.recomputed_token_count,
        swap_count=wire.swap_count,
        swapped_block_count=wire.swapped_block_count,
    )


def _ending(wire: gateway_pb2.Ending) -> tuple[FinishReason, str | int | None]:
    """Returns why a sample ended and what matched."""
    name = gateway_pb2.FinishReason.Name(wire.reason).removeprefix("FINISH_REASON_")
    matched = wire.WhichOneof("matched")
    return FinishReason[name], None if matched is None else getattr(wire, matched)


def events_from(response: gateway_pb2.GenerateStreamResponse) -> list[Event]:
    """Returns the events of one message of a stream."""
    match response.WhichOneof("event"):
        case "admitted":
            wire = response.admitted
            return [
                Admitted(wire.request_id, wire.prompt_token_count, wire.cached_token_count, _seconds(wire.queue_time))
            ]
        case "delta":
            return [_delta(sample) for sample in response.delta.samples]
        case "prompt_logprobs":
            return [PromptLogprobs(logprobs_from(response.prompt_logprobs.tokens))]
        case "finished":
            return [Finished(usage_from(response.finished.usage))]
        case _:
            # A newer server may send events that this client does not know.
            return []


def _delta(sample: gateway_pb2.SampleDelta) -> Delta:
    reason, stop = _ending(sample.ending) if sample.HasField("ending") else (None, None)
    return Delta(sample.index, sample.text, tuple(sample.token_ids), reason, stop, logprobs_from(sample.logprobs))


def generation_from(response: gateway_pb2.GenerateResponse) -> Generation:
    """Returns the whole answer to a request."""
    completions = [
        Completion(wire.index, wire.text, tuple(wire.token_ids), *_ending(wire.ending), logprobs_from(wire.logprobs))
        for wire in sorted(response.completions, key=lambda wire: wire.index)
    ]
    prompt = logprobs_from(response.prompt_logprobs.tokens)
    return Generation(response.request_id, tuple(completions), usage_from(response.usage), prompt)


def models_from(response: gateway_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """Returns the models that are served."""
    return tuple(
        Model(
            wire.name,
            wire.architecture,
            wire.max_model_len,
            wire.vocab_size,
            tuple(wire.executor_ids),
            {field.name: value for field, value in wire.default_sampling.ListFields()},
            wire.default_max_tokens if wire.HasField("default_max_tokens") else None,
        )
        for wire in response.models
    )
