"""The sequences that are open on this executor: their tokens, block tables and how far they are computed.

State is columns by row, changed by deltas; a row is taken when a sequence is added and given back when it is dropped.

    known     tokens whose ids are known, to the device at least: prompt, and what was sampled since
    computed  tokens whose keys and values are written; computed < known between steps, and the step that makes them
              equal samples the next known token
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from execsvc.grammars import Matcher
from execsvc.sampler import SamplingSpec
from quire.columns import Column
from quire.window import outside_block_count


@dataclasses.dataclass(slots=True)
class Sequence:
    """One open sequence."""

    table: int
    """Counter of its block table."""
    owner: int
    """Stream that added it; no other may name it."""
    row: int
    """Its row in the columns."""
    sampling: SamplingSpec
    tokens: npt.NDArray[np.int64]
    """Tokens that it was opened with. Of those sampled since, only the last is needed, and that is in the columns."""
    said: list[int] = dataclasses.field(default_factory=list)
    """Tokens sampled since, where they decide what may come next."""
    matcher: Matcher | None = None
    """Where it is in its grammar, if it has one."""
    unread: list[Callable[[], int]] = dataclasses.field(default_factory=list)
    """Give the tokens sampled since that its matcher has not taken, once a device has them; they may wait for it."""
    open: bool = True
    failed: bool = False
    """It was dropped because of an error, maybe while a later step with it was on its way."""
    sibling_seeds: tuple[int, ...] = ()
    """Seeds with which its next token is drawn besides; none once that is done."""

    @property
    def special(self) -> bool:
        """Whether its next token takes more than a draw from the logits: see `execsvc.choosing`."""
        return self.sampling.special or bool(self.sibling_seeds)


class RowObserver(Protocol):
    """Hears what changes in rows: for a device that keeps them, too."""

    tables: npt.NDArray[np.int32]
    """`[row, block_max]`: where the block tables are."""

    def table_written(self, row: int, start: int, stop: int) -> None:
        """Entries `start` .. `stop` - 1 of a row's block table have changed."""
        ...

    def row_added(self, row: int, tokens: npt.NDArray[np.int64], computed: int, sampling: SamplingSpec) -> None:
        """A row was taken by a sequence whose known tokens are `tokens`; its table is written already."""
        ...

    def row_dropped(self, row: int) -> None:
        """A row was given back."""
        ...


class SequenceRows:
    """Columns over all open sequences."""

    def __init__(
        self, row_count: int, max_model_len: int, block_size: int, observer: RowObserver | None = None
    ) -> None:
        """Makes room for `row_count` sequences of `max_model_len` tokens in blocks of `block_size`."""
        self.row_count = row_count
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.block_max = -(-max_model_len // block_size)
        self._observer = observer
        tables = np.zeros((row_count, self.block_max), dtype=np.int32) if observer is None else observer.tables
        self.block_tables: npt.NDArray[np.int32] = tables
        self.block_counts = np.zeros(row_count, dtype=np.int64)
        self.known = np.zeros(row_count, dtype=np.int64)
        self.computed = np.zeros(row_count, dtype=np.int64)
        self.released = np.zeros(row_count, dtype=np.int64)
        self.last_token = np.zeros(row_count, dtype=np.int64)
        self.draws = np.zeros(row_count, dtype=np.bool_)
        """`[row]`: whether it does not simply take the most likely token."""
        self.withheld_until = np.zeros(row_count, dtype=np.int64)
        """Position from which every token may be sampled."""
        self.special = np.zeros(row_count, dtype=np.bool_)
        """`[row]`: whether it takes more than a draw from the logits: `SamplingSpec.special`."""
        self.has_siblings = np.zeros(row_count, dtype=np.bool_)
        """`[row]`: whether its next token is drawn for siblings, too."""
        self.constrained = np.zeros(row_count, dtype=np.bool_)
        """`[row]`: whether a grammar says what may come next."""
        self.logprobs = np.zeros(row_count, dtype=np.int64)
        """`[row]`: most likely tokens reported with each token; -1 where no log-probability is."""
        self.reports_prompt = np.zeros(row_count, dtype=np.bool_)
        """`[row]`: whether log-probabilities of its prompt are reported."""
        self.by_table: dict[int, Sequence] = {}
        self._free_rows = list(range(row_count - 1, -1, -1))

    def __len__(self) -> int:
        """Number of open sequences."""
        return len(self.by_table)

    @property
    def full(self) -> bool:
        """Whether no row is left."""
        return not self._free_rows

    def add(
        self,
        table: int,
        owner: int,
        tokens: Column,
        blocks: Column,
        computed: int,
        sampling: SamplingSpec,
        sibling_seeds: tuple[int, ...] = (),
        matcher: Matcher | None = None,
    ) -> Sequence:
        """Opens a sequence. The caller has checked every argument and that a row is left."""
        row = self._free_rows.pop()
        sequence = Sequence(table, owner, row, sampling, tokens.astype(np.int64), sibling_seeds=sibling_seeds)
        sequence.matcher = matcher
        self.block_tables[row, : len(blocks)] = blocks
        self.block_counts[row] = len(blocks)
        self.known[row], self.computed[row] = len(tokens), computed
        self.released[row] = 0
        self.last_token[row] = tokens[-1]
        self.draws[row] = not sampling.greedy
        self.withheld_until[row] = sampling.withheld_until if sampling.withheld else 0
        self.special[row] = sampling.special
        self.has_siblings[row] = bool(sibling_seeds)
        self.constrained[row] = matcher is not None
        self.logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self.reports_prompt[row] = sampling.prompt_logprobs is not None
        self.by_table[table] = sequence
        if self._observer is not None:
            self._observer.table_written(row, 0, len(blocks))
            self._observer.row_added(row, sequence.tokens, computed, sampling)
        return sequence

    def set_entry(self, row: int, index: int, block: int) -> None:
        """Sets an entry of a block table, the next one or one that is there."""
        self.block_tables[row, index] = block
        self.block_counts[row] = max(int(self.block_counts[row]), index + 1)
        if self._observer is not None:
            self._observer.table_written(row, index, index + 1)

    def release_outside(self, rows: npt.NDArray[np.int64], window: int) -> None:
        """Makes table entries null whose blocks no query of these rows reads any more; see `quire.window`.

        The memory service gives those blocks to others. Kernels may load what lies outside the window and multiply it
        by zero, which an infinity would survive: the null block is zeros.
        """
        ends = (self.computed[rows] - window + 1) // self.block_size
        for row in rows[ends > self.released[rows]].tolist():
            end = outside_block_count(int(self.computed[row]), window, self.block_size)
            start = int(self.released[row])
            self.block_tables[row, start:end] = 0
            self.released[row] = end
            if self._observer is not None:
                self._observer.table_written(row, start, end)

    def drop(self, table: int) -> None:
        """Closes a sequence, if there is one of this table."""
        sequence = self.by_table.pop(table, None)
        if sequence is not None:
            sequence.open = False
            self.block_counts[sequence.row] = 0
            self._free_rows.append(sequence.row)
            if self._observer is not None:
                self._observer.row_dropped(sequence.row)

    def drop_owner(self, owner: int) -> None:
        """Closes every sequence of one stream."""
        for table in [table for table, sequence in self.by_table.items() if sequence.owner == owner]:
            self.drop(table)

    def drop_all(self) -> None:
        """Closes every sequence."""
        for table in list(self.by_table):
            self.drop(table)
