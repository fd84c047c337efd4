"""What is simulated: requests as columns, read from a trace or drawn from a distribution."""

from __future__ import annotations

import csv
import dataclasses
from datetime import datetime
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quire.errors import ConfigError
from quire.units import div_ceil

Lengths = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.uint32]

PREFIX_BLOCK_TOKENS: Final = 512
"""Tokens that one of a trace's `hash_ids` stands for."""
_UNIQUE_BIT: Final = 0x8000_0000
_SPREAD: Final = 2_654_435_761
_SHAREGPT_MEANS: Final = (161.0, 338.0)
_SHAREGPT_LONGEST: Final = 2048
_SHAREGPT_SIGMA: Final = 1.0
_LENGTH_MAXIMUM: Final = 2**24
_CSV_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_JSON_FIELDS: Final = ("timestamp", "input_length", "output_length")
DISTRIBUTIONS: Final = "sharegpt or fixed:PROMPT,OUTPUT"


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        name: for the reader of a result.
        prompt_lengths: `[request]` tokens, at least 1.
        output_lengths: `[request]` tokens generated in the end, at least 1.
        arrivals: `[request]` seconds since the first.
        hash_ids: for each request one id a run of PREFIX_BLOCK_TOKENS tokens: equal ids at the head of two prompts are
            equal prompts there. None where no prompt shares anything with another.
        knows_output: whether the request itself says its output's length (`max_tokens` with `ignore_eos`).
    """

    name: str
    prompt_lengths: Lengths
    output_lengths: Lengths
    arrivals: npt.NDArray[np.float64]
    hash_ids: list[Lengths] | None = None
    knows_output: bool = False

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def head(self, count: int) -> Workload:
        """Returns the first `count` requests."""
        return dataclasses.replace(
            self,
            prompt_lengths=self.prompt_lengths[:count],
            output_lengths=self.output_lengths[:count],
            arrivals=self.arrivals[:count],
            hash_ids=None if self.hash_ids is None else self.hash_ids[:count],
        )

    def prompt(self, index: int) -> Tokens:
        """Returns the token ids of a prompt: made up, but equal exactly where the trace says so."""
        length = int(self.prompt_lengths[index])
        if self.hash_ids is None:
            # No other prompt begins so; and a prefix that differs at its head shares nothing after it.
            first = np.uint32(_UNIQUE_BIT | index)
            return np.concatenate(([first], np.arange(1, length, dtype=np.uint32)))
        ids = self.hash_ids[index][: div_ceil(length, PREFIX_BLOCK_TOKENS)]
        runs = ids[:, None] * PREFIX_BLOCK_TOKENS + np.arange(PREFIX_BLOCK_TOKENS)
        return runs.reshape(-1)[:length].astype(np.uint32)

    def output_token(self, index: int, position: int) -> int:
        """Returns the token that the request generates at `position`; equal prompts go on differently."""
        return (index * _SPREAD + position) % _UNIQUE_BIT | _UNIQUE_BIT


def read_trace(path: str) -> Workload:
    """Returns the requests of a CSV file (TIMESTAMP, ContextTokens, GeneratedTokens) or of JSON lines.

    Raises:
        ConfigError: the file cannot be read, or a line of it; the message names file, line and field.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", field="trace") from None
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ConfigError(f"{path}: is empty, a header and rows or JSON lines are expected", field="trace")
    return _read_json_lines(path, lines) if first.lstrip().startswith("{") else _read_csv(path, lines)


def _read_csv(path: str, lines: list[str]) -> Workload:
    rows = csv.DictReader(lines)
    missing = [name for name in _CSV_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        message = f"{path}, line 1: no column {missing[0]}; expected are {', '.join(_CSV_COLUMNS)}"
        raise ConfigError(message, field="trace")
    prompts, outputs, arrivals = [], [], []
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        prompts.append(_length(where, "ContextTokens", row["ContextTokens"]))
        outputs.append(_length(where, "GeneratedTokens", row["GeneratedTokens"]))
        stamp = row["TIMESTAMP"]
        try:
            # Seven digits of a second are one more than Python reads.
            arrivals.append(datetime.fromisoformat(stamp[:26]).timestamp())
        except (TypeError, ValueError):
            message = f"{where}: TIMESTAMP: found {stamp!r}, expected a time such as 2023-11-16 18:15:46.68"
            raise ConfigError(message, field="trace") from None
    return _workload(path, prompts, outputs, np.array(arrivals), None)


def _read_json_lines(path: str, lines: list[str]) -> Workload:
    prompts, outputs, arrivals, hash_ids = [], [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: no JSON: {error}", field="trace") from None
        if not isinstance(row, dict) or not row.keys() >= set(_JSON_FIELDS):
            absent = next((name for name in _JSON_FIELDS if not isinstance(row, dict) or name not in row), "")
            raise ConfigError(f"{where}: no field {absent}; expected are {', '.join(_JSON_FIELDS)}", field="trace")
        prompts.append(_length(where, "input_length", row["input_length"]))
        outputs.append(_length(where, "output_length", row["output_length"]))
        arrivals.append(_seconds(where, row["timestamp"]))
        hash_ids.append(_hash_ids(where, row.get("hash_ids"), prompts[-1], len(prompts)))
    shared = any(ids is not None for ids in hash_ids)
    if shared and any(ids is None for ids in hash_ids):
        raise ConfigError(f"{path}: some lines have hash_ids and some have none", field="trace")
    return _workload(path, prompts, outputs, np.array(arrivals), [ids for ids in hash_ids if ids is not None] or None)


def _length(where: str, field: str, value: Any) -> int:
    """Returns a count of tokens; an output of 0 counts as 1, the least that can be asked for."""
    try:
        length = int(value)
    except (TypeError, ValueError):
        length = -1
    least = 0 if field in {"GeneratedTokens", "output_length"} else 1
    if isinstance(value, bool | float) or not least <= length <= _LENGTH_MAXIMUM:
        message = f"{where}: {field}: found {value!r}, allowed are whole numbers {least} .. {_LENGTH_MAXIMUM}"
        raise ConfigError(message, field="trace")
    return max(1, length)


def _seconds(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ConfigError(f"{where}: timestamp: found {value!r}, expected milliseconds", field="trace")
    return value / 1000


def _hash_ids(where: str, value: Any, prompt_length: int, line: int) -> Lengths | None:
    if value is None:
        return None
    needed = div_ceil(prompt_length, PREFIX_BLOCK_TOKENS)
    limit = _UNIQUE_BIT // PREFIX_BLOCK_TOKENS
    del line
    valid = isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < limit for item in value
    )
    if not valid or len(value) < needed:
        message = (
            f"{where}: hash_ids: expected at least {needed} whole numbers 0 .. {limit - 1}, one for each "
            f"{PREFIX_BLOCK_TOKENS} tokens of input_length"
        )
        raise ConfigError(message, field="trace")
    return np.array(value, np.int64)


def _workload(
    path: str, prompts: list[int], outputs: list[int], arrivals: npt.NDArray[np.float64], hash_ids: list[Lengths] | None
) -> Workload:
    if not prompts:
        raise ConfigError(f"{path}: has no rows", field="trace")
    order = np.argsort(arrivals, kind="stable")
    ordered = None if hash_ids is None else [hash_ids[at] for at in order.tolist()]
    return Workload(
        Path(path).name,
        np.array(prompts, np.int64)[order],
        np.array(outputs, np.int64)[order],
        arrivals[order] - arrivals[order[0]],
        ordered,
    )


def draw(distribution: str, count: int, seed: int) -> Workload:
    """Returns `count` requests whose lengths come from a distribution.

    Args:
        distribution: `sharegpt`: lognormal prompts and outputs with the means of the ShareGPT set (161 and 338 tokens)
            and sigma 1, a prompt of at most 1024 tokens and 2048 together, or `fixed:PROMPT,OUTPUT`: all alike, and the
            request says so.
        count: how many.
        seed: the same seed gives the same lengths.

    Raises:
        ConfigError: no such distribution.
    """
    arrivals = np.zeros(count)
    if distribution == "sharegpt":
        prompts, outputs = _draw_sharegpt(count, np.random.default_rng(seed))
        return Workload("sharegpt", prompts, outputs, arrivals)
    kind, _, lengths = distribution.partition(":")
    parts = lengths.split(",")
    possible = all(part.isdigit() and 0 < int(part) < _LENGTH_MAXIMUM for part in parts)
    if kind == "fixed" and possible and len(parts) == 2:  # noqa: PLR2004 - prompt and output
        prompt, output = int(parts[0]), int(parts[1])
        return Workload(distribution, np.full(count, prompt), np.full(count, output), arrivals, knows_output=True)
    raise ConfigError(f"--distribution: found {distribution!r}, expected {DISTRIBUTIONS}", field="distribution")


def _draw_sharegpt(count: int, generator: np.random.Generator) -> tuple[Lengths, Lengths]:
    """Draws pairs of lengths; what would make a pair longer than the longest sequence is cut off its output."""
    locations = np.log(_SHAREGPT_MEANS) - _SHAREGPT_SIGMA**2 / 2
    drawn = np.exp(generator.normal(locations, _SHAREGPT_SIGMA, (count, 2))).round().astype(np.int64)
    prompts = drawn[:, 0].clip(1, _SHAREGPT_LONGEST // 2)
    return prompts, np.minimum(drawn[:, 1].clip(1), _SHAREGPT_LONGEST - prompts)
