"""Constraints of requests as grammars: checked before a request is queued, applied where its tokens are sampled."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

import llguidance

from gateway.refusal import refusal
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import InvalidRequestError

MAX_CHARACTERS: Final = 65_536
MAX_CHOICES: Final = 1_024
MAX_CHOICE_CHARACTERS: Final = 4_096
_SEPARATORS: Final[dict[str, Any]] = {
    # Free space would let a model that is unsure write it until max_tokens.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


async def check_constraint(spec: pb.GenerationSpec) -> str:
    """Returns the grammar of a request, empty if it has none.

    Raises:
        InvalidRequestError: it is no schema, regular expression or grammar, or it cannot be kept.
    """
    kind = spec.constraint.WhichOneof("kind")
    if kind is None:
        return ""
    field = f"constraint.{kind}"
    if spec.stopping.ignore_eos:
        raise refusal("stopping.ignore_eos", "true", "false together with a constraint, which the end token ends")
    if spec.stopping.min_tokens:
        raise refusal("stopping.min_tokens", spec.stopping.min_tokens, "0 together with a constraint")
    grammar = _choice_grammar(spec.constraint.choice) if kind == "choice" else _grammar(spec.constraint, kind, field)
    # What is large takes long, and the library lets others run meanwhile.
    wrong, messages = await asyncio.to_thread(llguidance.LLMatcher.validate_grammar_with_warnings, grammar)
    if wrong:
        raise _invalid(field, messages[0])
    return grammar


def _grammar(constraint: pb.Constraint, kind: str, field: str) -> str:
    """Returns the grammar of a text that says it; raises InvalidRequestError."""
    text: str = getattr(constraint, kind)
    if not 1 <= len(text) <= MAX_CHARACTERS:
        raise refusal(field, f"{len(text)} characters", f"1 .. {MAX_CHARACTERS}")
    matcher = llguidance.LLMatcher
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "grammar":
        return matcher.grammar_from_lark(text)
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise _invalid(field, "a schema is a JSON object")
        return matcher.grammar_from_json_schema(schema, overrides=_SEPARATORS)  # type: ignore[arg-type]
    except ValueError as error:
        raise _invalid(field, str(error)) from error


def _choice_grammar(choice: pb.Choice) -> str:
    """Returns the grammar of one of some texts; raises InvalidRequestError."""
    field = "constraint.choice.texts"
    if not 1 <= len(choice.texts) <= MAX_CHOICES:
        raise refusal(field, f"{len(choice.texts)} texts", f"1 .. {MAX_CHOICES}")
    for index, text in enumerate(choice.texts):
        if not 1 <= len(text) <= MAX_CHOICE_CHARACTERS:
            raise refusal(f"{field}[{index}]", f"{len(text)} characters", f"1 .. {MAX_CHOICE_CHARACTERS}")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice.texts)


def _invalid(field: str, message: str) -> InvalidRequestError:
    """Returns the error for what cannot be parsed."""
    first = " ".join(message.split())[:500]
    return InvalidRequestError(f"{field}: {first}", field=field, reason="INVALID_CONSTRAINT")
