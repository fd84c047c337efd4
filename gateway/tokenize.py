"""Text to tokens: the model's tokenizer and chat template, as the executor hands them out."""

from __future__ import annotations

from array import array
import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from gateway.detokenize import TokenBytes
from quire.errors import CorruptionError, InvalidRequestError

_INLINE_CHARACTERS: Final = 4_096
"""Longer text is tokenised in a worker thread (the tokenizer releases the GIL), so that streams do not stall."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What an executor serves of its model's tokenizer."""

    tokenizer_json: bytes
    sha256: bytes
    chat_template: str
    bos_token: str
    eos_token: str


class ModelTokenizer:
    """Tokenizer and chat template of one model."""

    def __init__(self, files: TokenizerFiles, *, add_bos_token: bool) -> None:
        """Parses the files.

        Raises:
            CorruptionError: the checksum does not match, or it is no tokenizer.
        """
        if hashlib.sha256(files.tokenizer_json).digest() != files.sha256:
            raise CorruptionError("tokenizer.json arrived damaged: its SHA-256 is not the one announced")
        try:
            self._tokenizer = Tokenizer.from_buffer(files.tokenizer_json)
        except ValueError as error:
            raise CorruptionError(f"tokenizer.json cannot be parsed: {error}") from error
        self.add_bos_token = add_bos_token
        self.files = files
        self._template = _compile(files.chat_template) if files.chat_template else None
        self.token_bytes = TokenBytes(self._tokenizer)

    async def encode_text(self, text: str) -> array[int]:
        """Returns the tokens of a prompt; special tokens written in it are recognised."""
        return await self._encode(text, add_special_tokens=self.add_bos_token)

    async def encode_more(self, text: str) -> array[int]:
        """Returns the tokens of a text that follows other tokens; special tokens written in it are recognised."""
        return await self._encode(text, add_special_tokens=False)

    def written(self, tokens: Sequence[int]) -> str:
        """Returns what tokens spell with their special tokens written out, as a chat template writes them."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> array[int]:
        """Returns the tokens of a conversation, with the opening of the assistant's turn.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the conversation.
        """
        return await self._encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns the text of a conversation; raises as `encode_chat`."""
        if self._template is None:
            raise InvalidRequestError("chat: this model has no chat template; send the prompt as text", field="chat")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self.files.bos_token,
                eos_token=self.files.eos_token,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            message = f"chat: the model's chat template refuses this conversation: {error}"
            raise InvalidRequestError(message, field="chat", reason="INVALID_CHAT") from error

    async def _encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        if len(text) <= _INLINE_CHARACTERS:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            encoding = await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return array("I", encoding.ids)


def _compile(source: str) -> jinja2.Template:
    """Returns the chat template. It comes from a model's files and is not trusted: it runs in a sandbox.

    Raises:
        CorruptionError: it is not a template.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> Any:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CorruptionError(f"the model's chat template cannot be parsed: {error}") from error
