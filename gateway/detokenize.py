"""Tokens to text, one token at a time: only whole characters come out, and nothing that may become a stop string."""

from __future__ import annotations

import codecs
import json
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    The alphabet of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 onwards.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + offset): byte for offset, byte in enumerate(others)}


class TokenBytes:
    """The bytes of every token, for vocabularies that are byte-level; others decode through the library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads the vocabulary once."""
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self._pieces: list[bytes] | None = self._read_pieces() if decoder.get("type") == "ByteLevel" else None

    def _read_pieces(self) -> list[bytes]:
        """Returns the bytes of each token id; special tokens have none."""
        alphabet = _byte_alphabet()
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, token in vocabulary.items():
            if token in added:
                pieces[token] = b"" if added[token].special else added[token].content.encode()
            else:
                pieces[token] = bytes(alphabet[character] for character in text)
        return pieces

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Returns a function that takes the next tokens and returns the text that is now certain."""
        if self._pieces is None:
            return self._library_decoder()
        pieces = self._pieces
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

        count = len(pieces)

        def step(tokens: Sequence[int]) -> str:
            if len(tokens) == 1:
                return decode(pieces[tokens[0]]) if tokens[0] < count else ""
            return decode(b"".join([pieces[token] for token in tokens if token < count]))

        return step

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens by themselves; what is no whole character shows as replacement characters."""
        if self._pieces is None:
            return self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        pieces = self._pieces
        return b"".join(pieces[token] for token in tokens if token < len(pieces)).decode(errors="replace")

    def _library_decoder(self) -> Callable[[Sequence[int]], str]:
        stream = DecodeStream(ids=[], skip_special_tokens=True)

        def step(tokens: Sequence[int]) -> str:
            return "".join([stream.step(self._tokenizer, token) or "" for token in tokens])

        return step


class Detokenizer:
    """Text of one sample as it grows.

    Text is held back while it ends with a proper prefix of a stop string; `flush` releases it at the end.
    """

    __slots__ = ("_decode", "_held", "_longest", "_stops")

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str]) -> None:
        """Starts empty, watching for `stops`."""
        self._decode = token_bytes.decoder()
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes the next token.

        Args:
            token: its id.
            may_stop: whether stop strings are looked for; what comes before is not searched later either.

        Returns:
            The text that is certain now, and the stop string that has appeared, if one has: the text ends before it.
        """
        text = self._decode((token,))
        if not self._stops or not may_stop:
            return text, None
        held = self._held + text
        found = min(((held.find(stop), -len(stop), stop) for stop in self._stops if stop in held), default=None)
        if found is not None:
            self._held = ""
            return held[: found[0]], found[2]
        keep = self._unsafe_suffix_length(held)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut], None

    def _unsafe_suffix_length(self, text: str) -> int:
        """Returns the length of the longest suffix of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0

    def flush(self) -> str:
        """Returns what was held back: no stop string is coming any more. An incomplete character is dropped."""
        held, self._held = self._held, ""
        return held
