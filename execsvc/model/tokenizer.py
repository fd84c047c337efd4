"""The tokenizer that travels to gateways: a tokenizer.json, a chat template, and the special tokens.

A Hugging Face directory has it all in files. A GGUF file has vocabulary, merges and the name of the pre-tokenizer in
its metadata; from these a tokenizer.json is built that gives the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quire.errors import ModelFormatError, UnsupportedError

_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: Final = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}
_GPT2: Final = {"gpt-2", "gpt2", "default"}
_DIGITS: Final = {"smollm"}
SUPPORTED_PRE_TOKENIZERS: Final = sorted(_GPT2 | _DIGITS | set(_SPLITS))


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a gateway needs to turn text into tokens and back."""

    json: str
    """tokenizer.json, the format of `tokenizers`."""
    chat_template: str
    """Jinja; empty if the model has none."""
    bos_token: str
    """Text of the begin-of-sequence token, empty for none."""
    eos_token: str
    """Text of the end-of-sequence token, empty for none."""
    bos_token_id: int | None
    add_bos_token: bool
    """Whether a prompt begins with bos_token_id."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion."""


def from_gguf(metadata: Mapping[str, Any], origin: str) -> TokenizerFiles:
    """Returns the tokenizer in the metadata of a GGUF file.

    Raises:
        ModelFormatError: a key is missing.
        UnsupportedError: a kind of tokenizer that cannot be rebuilt.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelFormatError(f"{origin}: tokenizer.ggml.tokens is missing")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ModelFormatError(f"{origin}: {len(types)} token types for {len(tokens)} tokens")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens, origin)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens, types)
    else:
        raise UnsupportedError(
            f"{origin}: tokenizer {kind!r} is not supported; supported are gpt2 and llama", field="tokenizer"
        )
    tokenizer.add_special_tokens([_added(token) for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
    tokenizer.add_tokens([_added(token) for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED])
    eos_ids = [metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    return TokenizerFiles(
        json=tokenizer.to_str(),
        chat_template=metadata.get("tokenizer.chat_template", ""),
        bos_token="" if bos_id is None else tokens[bos_id],
        eos_token="" if eos_ids[0] is None else tokens[eos_ids[0]],
        bos_token_id=bos_id,
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")) and bos_id is not None,
        eos_token_ids=tuple(dict.fromkeys(token for token in eos_ids if token is not None)),
    )


def _added(token: str) -> AddedToken:
    """Returns a token that is matched in text as it stands, before anything else."""
    return AddedToken(token, normalized=False, special=True)


def _merges(metadata: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelFormatError(f"{origin}: tokenizer.ggml.merges is missing")
    if not all(isinstance(merge, str) and " " in merge for merge in merges):
        raise ModelFormatError(f"{origin}: tokenizer.ggml.merges holds a line that is no pair")
    return [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in merges]


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str], origin: str) -> Tokenizer:
    """Returns a byte-level BPE (GPT-2's kind) with the pre-tokenizer that the file names."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ignore_merges = pre in {"llama-bpe", "llama3", "llama-v3"}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(metadata, origin), ignore_merges=ignore_merges))
    if pre in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif pre in _GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise UnsupportedError(
            f"{origin}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(SUPPORTED_PRE_TOKENIZERS)}",
            field="tokenizer",
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """Returns a sentencepiece BPE (Llama 2's kind).

    The file has scores, not merges: the better a piece's score, the earlier it is merged. Every way to split a piece
    into two others is a merge of its rank.
    """
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, str, str]] = []
    for token, kind in zip(tokens, types, strict=True):
        if kind in {_CONTROL, _BYTE, _UNUSED, _USER_DEFINED}:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[vocabulary[token]], left, right))
    ranked.sort(key=lambda row: (row[0], vocabulary[row[1]], vocabulary[row[2]]))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    strip: list[decoders.Decoder] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        strip.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path}: a JSON object is needed")
    return values


def _text_of(token: object) -> str:
    """Returns a special token's text: configs give it as text or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str:
    """Returns the chat template of a directory; of several the one named "default"."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template", "")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template", "") for entry in template}
        return str(named.get("default", ""))
    return str(template or "")


def from_directory(directory: Path, vocab_size: int) -> TokenizerFiles:
    """Returns the tokenizer of a Hugging Face directory.

    Raises:
        ModelFormatError: tokenizer.json is missing or damaged, or has more tokens than the model.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelFormatError(f"{directory}: tokenizer.json is missing; convert the tokenizer to the fast format")
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ModelFormatError(f"{path}: not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise ModelFormatError(f"{path}: {tokenizer.get_vocab_size()} tokens, the model has {vocab_size}")
    settings = _read(directory / "tokenizer_config.json")
    generation, config = _read(directory / "generation_config.json"), _read(directory / "config.json")
    bos_token, eos_token = _text_of(settings.get("bos_token")), _text_of(settings.get("eos_token"))
    eos_ids: list[int] = []
    for value in (tokenizer.token_to_id(eos_token), generation.get("eos_token_id"), config.get("eos_token_id")):
        eos_ids.extend(value if isinstance(value, list) else [] if value is None else [value])
    bos_id = tokenizer.token_to_id(bos_token) if bos_token else config.get("bos_token_id")
    added = tokenizer.encode("").ids
    adds_bos = bool(settings.get("add_bos_token", bos_id is not None and added[:1] == [bos_id]))
    return TokenizerFiles(
        json=text,
        chat_template=_chat_template(directory, settings),
        bos_token=bos_token,
        eos_token=eos_token,
        bos_token_id=bos_id,
        add_bos_token=adds_bos and bos_id is not None,
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
    )
