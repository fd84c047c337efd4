"""What comes of a step's logits: tokens, first tokens of siblings, log-probabilities.

`execsvc.sampler` chooses from logits alone. Here is what takes more: the sequence's tokens so far (penalties), several
draws from one row (siblings), and what is reported of the logits besides. Every row is worked on by itself, so that
nothing depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from execsvc.grammars import Matcher
from execsvc.sampler import SamplingSpec, most_likely, sample
from execsvc.sequences import Sequence

Siblings = dict[int, list[int]]
"""Tokens drawn with the sibling seeds of a sequence, by its place among those that sample; -1 as in `sample`."""


@dataclasses.dataclass(slots=True)
class LogprobRows:
    """Log-probabilities, as the columns of `quire.execsvc.v1.Logprobs`."""

    tables: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    ranks: list[int] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)

    def add(self, table: int, position: int, logits: torch.Tensor, token: int, count: int) -> None:
        """Adds a row.

        Args:
            table: of the sequence.
            position: of the token in it.
            logits: `[vocabulary]`, as the model gave them.
            token: which one is there.
            count: most likely tokens to report besides.
        """
        exact = logits.double()
        logarithms = exact - torch.logsumexp(exact, -1)
        most = most_likely(exact, min(count, len(exact))).tolist() if count else []
        tokens = [token, *most]
        self.tables.append(table)
        self.positions.append(position)
        self.ranks.append(int((exact > exact[token]).sum()) + 1)
        self.counts.append(len(tokens))
        self.token_ids += tokens
        self.values += logarithms[tokens].tolist()


@dataclasses.dataclass(slots=True)
class Choice:
    """What was chosen in a step, a place for each sequence that samples."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    """-1 for logits that are not finite."""
    siblings: Siblings = dataclasses.field(default_factory=dict)
    logprobs: LogprobRows = dataclasses.field(default_factory=LogprobRows)


def choose(
    logits: torch.Tensor, samplers: list[Sequence], positions: Rows[int], best: Rows[int] | None = None
) -> Choice:
    """Chooses a token for each row of `logits`, and draws for siblings, whose seeds are used up.

    Args:
        logits: `[row, vocabulary]`, any float type; not changed.
        samplers: the sequence of each row.
        positions: index in its sequence of the token chosen, a row each.
        best: the most likely token of each row, if who computed the logits knows; see `sample`.
    """
    specs = [sequence.sampling for sequence in samplers]
    if not any(sequence.special for sequence in samplers):
        return Choice(sample(logits, specs, positions, best) if samplers else [])
    changed = logits
    for row, sequence in enumerate(samplers):
        spec = sequence.sampling
        if spec.bias or spec.penalizes or sequence.matcher is not None:
            changed = logits.float().clone() if changed is logits else changed
            if sequence.matcher is not None:
                forbid_others(changed[row], sequence.matcher)
            change_logits(
                changed[row],
                spec,
                np.concatenate([sequence.tokens, np.array(sequence.said, dtype=np.int64)]),
                positions[row],
            )
    places = list(range(len(samplers)))
    for place, sequence in enumerate(samplers):
        places += [place] * len(sequence.sibling_seeds)
        specs += [dataclasses.replace(sequence.sampling, seed=seed) for seed in sequence.sibling_seeds]
        sequence.sibling_seeds = ()
    rows = changed if len(places) == len(samplers) else changed[places]
    tokens = sample(rows, specs, [positions[place] for place in places])
    choice = Choice(tokens[: len(samplers)])
    for sequence, token in zip(samplers, choice.tokens, strict=True):
        if sequence.sampling.penalizes:
            sequence.said.append(token)
        if sequence.matcher is not None and token >= 0:
            sequence.matcher.advance(token)
    for place, token in zip(places[len(samplers) :], tokens[len(samplers) :], strict=True):
        choice.siblings.setdefault(place, []).append(token)
    for place, sequence in enumerate(samplers):
        count = sequence.sampling.logprobs
        if count is not None and choice.tokens[place] >= 0:
            for token in (choice.tokens[place], *choice.siblings.get(place, ())):
                choice.logprobs.add(sequence.table, positions[place], logits[place], token, count)
    return choice


def forbid_others(logits: torch.Tensor, matcher: Matcher) -> None:
    """Makes every token impossible that a grammar does not allow next. Writes `logits`, `[vocabulary]`."""
    allowed = matcher.allowed()
    if allowed is not None:
        logits.masked_fill_(~torch.from_numpy(allowed).to(logits.device), -torch.inf)


def change_logits(logits: torch.Tensor, spec: SamplingSpec, tokens: npt.NDArray[np.int64], position: int) -> None:
    """Applies bias and penalties to one row. Writes `logits`.

    The rules are those of vLLM: a repetition counts in the prompt, too; frequency and presence only among what was
    generated. A withheld token is impossible before and after.

    Args:
        logits: `[vocabulary]` float32.
        spec: how to choose.
        tokens: `[token]` what the sequence has so far, prompt included.
        position: index of the token that is chosen.
    """
    if spec.bias:
        at = torch.tensor([token for token, _ in spec.bias], device=logits.device)
        logits[at] += torch.tensor([value for _, value in spec.bias], dtype=logits.dtype, device=logits.device)
    if not spec.penalizes:
        return
    if spec.repetition_penalty != 1.0:
        at = torch.from_numpy(np.unique(tokens)).to(logits.device)
        values = logits[at]
        logits[at] = torch.where(values > 0, values / spec.repetition_penalty, values * spec.repetition_penalty)
    generated, counts = np.unique(tokens[spec.prompt_token_count : position], return_counts=True)
    if len(generated):
        at, times = (torch.from_numpy(column).to(logits.device) for column in (generated, counts))
        logits[at] -= spec.frequency_penalty * times.to(logits.dtype)
        logits[at] -= spec.presence_penalty


def prompt_rows(sequence: Sequence, first: int, count: int) -> range:
    """Returns the positions among `first` .. `first + count` - 1 whose logits tell of the prompt's next token."""
    spec = sequence.sampling
    if spec.prompt_logprobs is None:
        return range(0)
    return range(first, min(first + count, spec.prompt_token_count - 1))


def add_prompt_logprobs(rows: LogprobRows, sequence: Sequence, position: int, logits: torch.Tensor) -> None:
    """Adds what the logits at a position of the prompt, `[vocabulary]`, say of the token behind it."""
    count = sequence.sampling.prompt_logprobs
    assert count is not None
    rows.add(sequence.table, position + 1, logits, int(sequence.tokens[position + 1]), count)
