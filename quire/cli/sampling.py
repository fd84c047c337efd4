"""The options of `quire generate` and `quire chat` that say how to generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from quire.errors import InvalidRequestError

Temperature: TypeAlias = Annotated[
    float | None, typer.Option(help="0 is greedy, higher is more varied, at most 100. [default: 1]", show_default=False)
]
TopP: TypeAlias = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens that together reach this probability.")
]
TopK: TypeAlias = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
MinP: TypeAlias = Annotated[
    float | None, typer.Option(help="Drop tokens less likely than this times the likeliest one.")
]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Same seed, same text. Drawn at random if not given.")]
MaxTokens: TypeAlias = Annotated[
    int | None, typer.Option(help="Tokens to generate at most. [default: as many as fit]", show_default=False)
]
MinTokens: TypeAlias = Annotated[int | None, typer.Option(help="Tokens to generate at least.")]
TimeLimit: TypeAlias = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="End with what there is after this time, the queue included.")
]
Priority: TypeAlias = Annotated[
    int | None, typer.Option(help="Lower goes first, where the server goes by priorities. [default: 0]")
]
Stop: TypeAlias = Annotated[
    list[str] | None, typer.Option(help="End at this string, which is not printed; may be repeated.")
]
ModelName: TypeAlias = Annotated[str, typer.Option("--model", help="Name of the model, if several are served.")]
Timeout: TypeAlias = Annotated[float, typer.Option(min=0.001, help="Seconds that the answer may take.")]

TypicalP: TypeAlias = Annotated[
    float | None, typer.Option(help="Keep the tokens of nearly the expected surprise that reach this probability.")
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="More than 1 makes tokens of prompt and completion less likely. [default: 1]")
]
PresencePenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Subtracted from the logits of generated tokens, -2 .. 2. [default: 0]")
]
FrequencyPenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Subtracted for each time that a token was generated, -2 .. 2. [default: 0]")
]
LogitBias: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN=VALUE", help="Add to the logit of a token id, -100 .. 100; may be repeated."),
]
BestOf: TypeAlias = Annotated[
    int | None, typer.Option(help="Generate this many samples and print the n most likely. [default: n]")
]
BeamWidth: TypeAlias = Annotated[
    int | None, typer.Option(help="Search for the likeliest completions with this many beams instead of sampling.")
]
LengthPenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Of a search: above 0 longer completions are worth more. [default: 1]")
]
EarlyStopping: TypeAlias = Annotated[
    bool, typer.Option("--early-stopping", help="End a search once as many completions have ended as it has beams.")
]
GuidedJson: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="SCHEMA", help="Generate a JSON document of this schema; @FILE reads a file."),
]
GuidedRegex: TypeAlias = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Generate what this regular expression matches as a whole.")
]
GuidedChoice: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Generate one of some texts; to be repeated.")
]
GuidedGrammar: TypeAlias = Annotated[
    str | None, typer.Option(metavar="LARK", help="Generate a text of this Lark grammar; @FILE reads it from a file.")
]
Logprobs: TypeAlias = Annotated[
    int | None, typer.Option(help="With --json: log-probabilities of each token and of this many likeliest, 0 .. 20.")
]
PromptLogprobs: TypeAlias = Annotated[
    int | None, typer.Option(help="With --json: the same for the prompt, all of which is computed then.")
]
Echo: TypeAlias = Annotated[bool, typer.Option("--echo", help="Print the prompt before its completion.")]
IncludeStop: TypeAlias = Annotated[
    bool, typer.Option("--include-stop-str-in-output", help="Print the stop string that ended a sample, too.")
]


def logit_bias(given: list[str] | None) -> dict[int, float] | None:
    """Returns what is to be added to logits, by token.

    Raises:
        InvalidRequestError: an entry is not TOKEN=VALUE.
    """
    if not given:
        return None
    bias: dict[int, float] = {}
    for entry in given:
        token, _, value = entry.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError as error:
            message = f"--logit-bias: found {entry!r}, allowed is TOKEN=VALUE, for example 50256=-100"
            raise InvalidRequestError(message, field="logit_bias") from error
    return bias


def text_or_file(given: str | None, option: str) -> str | None:
    """Returns a text, or what is in the file that "@FILE" names.

    Raises:
        InvalidRequestError: the file cannot be read.
    """
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{option}: {given[1:]!r} cannot be read: {error}", field=option) from error
