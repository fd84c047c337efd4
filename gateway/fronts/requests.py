"""Checked requests, models and sessions, as they travel between a front and the engine."""

from __future__ import annotations

from array import array

from gateway.core.beam import BeamSettings
from gateway.core.request import RequestSettings, SamplingSettings
from gateway.core.session import Message, Session, TurnEnd
from gateway.models import ServedModel
from gateway.tokenize import ModelTokenizer
from protos.gateway.v1 import engine_pb2 as pb
from protos.gateway.v1 import gateway_pb2
from quire import columns


def to_submit(stream: int, settings: RequestSettings) -> pb.Submit:
    """Returns a request as it is sent to the engine, for a stream of this number."""
    submit = pb.Submit(
        stream=stream,
        request_id=settings.request_id,
        model=settings.model,
        prompt=columns.pack(settings.prompt),
        sampling=_to_sampling(settings),
        eos_token_ids=sorted(settings.eos_token_ids),
        grammar=settings.grammar,
        tenant=settings.tenant,
        max_queue_seconds=settings.max_queue_time,
        time_limit_seconds=settings.time_limit,
        priority=settings.priority,
        session_id=settings.session_id,
        retention_ttl_seconds=settings.retention_ttl,
    )
    stopping = submit.stopping
    stopping.max_tokens, stopping.min_tokens = settings.max_tokens, settings.min_tokens
    stopping.stop.extend(settings.stop)
    stopping.stop_token_ids.extend(sorted(settings.stop_token_ids))
    stopping.include_stop_str_in_output = settings.include_stop_str
    if settings.logprobs is not None:
        submit.output.logprobs = settings.logprobs
    if settings.prompt_logprobs is not None:
        submit.output.prompt_logprobs = settings.prompt_logprobs
    submit.output.echo = settings.echo
    caching = submit.caching
    caching.salt = settings.cache_salt
    caching.skip_read, caching.skip_write = settings.skip_cache_read, settings.skip_cache_write
    return submit


def _to_sampling(settings: RequestSettings) -> gateway_pb2.Sampling:
    """Returns how tokens are chosen, with every field set."""
    sampling = settings.sampling
    message = gateway_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        typical_p=sampling.typical_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        n=settings.answer_count,
        best_of=settings.sample_count,
    )
    if settings.beam is not None:
        message.beam_width = settings.beam.width
        message.length_penalty = settings.beam.length_penalty
        message.early_stopping = settings.beam.early_stopping
    return message


def from_submit(submit: pb.Submit) -> RequestSettings:
    """Returns the request that a front has sent; the inverse of `to_submit`."""
    sampling, stopping, output = submit.sampling, submit.stopping, submit.output
    beam = None
    if sampling.HasField("beam_width"):
        beam = BeamSettings(sampling.beam_width, sampling.length_penalty, sampling.early_stopping)
    return RequestSettings(
        request_id=submit.request_id,
        model=submit.model,
        prompt=_tokens(submit.prompt, "prompt"),
        max_tokens=stopping.max_tokens,
        min_tokens=stopping.min_tokens,
        sampling=SamplingSettings(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
        ),
        sample_count=sampling.best_of,
        answer_count=sampling.n,
        stop=tuple(stopping.stop),
        stop_token_ids=frozenset(stopping.stop_token_ids),
        include_stop_str=stopping.include_stop_str_in_output,
        eos_token_ids=frozenset(submit.eos_token_ids),
        tenant=submit.tenant,
        cache_salt=submit.caching.salt,
        skip_cache_read=submit.caching.skip_read,
        skip_cache_write=submit.caching.skip_write,
        max_queue_time=submit.max_queue_seconds,
        time_limit=submit.time_limit_seconds,
        priority=submit.priority,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        echo=output.echo,
        grammar=submit.grammar,
        beam=beam,
        session_id=submit.session_id,
        retention_ttl=submit.retention_ttl_seconds,
    )


def to_model(model: ServedModel) -> pb.EngineModel:
    """Returns a model as fronts hear of it."""
    return pb.EngineModel(
        model=model.described(),
        pool_token_count=model.pool_token_count,
        eos_token_ids=sorted(model.eos_token_ids),
        tokenizer_sha256=model.tokenizer.files.sha256,
        add_bos_token=model.tokenizer.add_bos_token,
    )


def from_model(message: pb.EngineModel, tokenizer: ModelTokenizer) -> ServedModel:
    """Returns a model as the engine serves it, with the front's own copy of its tokenizer."""
    listed = message.model
    return ServedModel(
        name=listed.name,
        architecture=listed.architecture,
        vocab_size=listed.vocab_size,
        max_model_len=listed.max_model_len,
        pool_token_count=message.pool_token_count,
        eos_token_ids=frozenset(message.eos_token_ids),
        tokenizer=tokenizer,
        executor_ids=tuple(listed.executor_ids),
        default_sampling=listed.default_sampling,
        default_max_tokens=listed.default_max_tokens if listed.HasField("default_max_tokens") else None,
    )


def to_content(session: Session) -> pb.SessionContent:
    """Returns everything that a session consists of."""
    ends = [figure for turn in session.turns for figure in (turn.token_count, turn.message_count, turn.text_length)]
    return pb.SessionContent(
        session_id=session.session_id,
        model=session.model,
        ttl_seconds=session.ttl,
        tokens=columns.pack(session.tokens),
        messages=[gateway_pb2.ChatMessage(role=role, content=content) for role, content in session.messages],
        text=session.text,
        turn_ends=columns.pack(ends),
    )


def from_content(content: pb.SessionContent) -> Session:
    """Returns a front's copy of a session, for the length of a turn."""
    session = Session(content.session_id, content.model, content.ttl_seconds, expires_at=0.0)
    update_session(session, content)
    return session


def update_session(session: Session, content: pb.SessionContent) -> None:
    """Makes a session what a turn has made of it."""
    ends = columns.unpack_list(content.turn_ends, "turn_ends", row_length=3)
    session.tokens = _tokens(content.tokens, "tokens")
    session.messages = [Message(message.role, message.content) for message in content.messages]
    session.text = content.text
    session.turns = [TurnEnd(*row) for row in zip(ends[::3], ends[1::3], ends[2::3], strict=True)]


def _tokens(column: bytes, field: str) -> array[int]:
    """Returns a column of tokens as it is kept."""
    return array("I", columns.unpack_list(column, field))
