"""The rules of sliding windows, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_MEMORY: Final = "memsvc.core.pool_memory:PoolMemory"
_WRITER: Final = "memsvc.core.writer:JournalWriter"
_SCHEDULER: Final = "gateway.core.scheduler:Scheduler"

WINDOW: Final = (
    Mutant(
        "a block is released when the tokens that read it are planned, not when they are confirmed",
        "memsvc.core.sliding:release_outside",
        "tables.written[due].tolist()",
        "tables.tokens[due].tolist()",
        "a_step_in_flight_keeps_what_it_reads",
    ),
    Mutant(
        "what is outside the window is kept",
        f"{_WRITER}.apply",
        "if self._memory.window:",
        "if False:",
        "a_window_that_moves_lets_go_of_what_is_behind",
    ),
    Mutant(
        "a released block is still in the table",
        "memsvc.core.sliding:release_outside",
        'record.blocks[start:end] = array("q", bytes(8 * (end - start)))',
        "pass",
        "a_window_that_moves_lets_go_of_what_is_behind",
    ),
    Mutant(
        "a released block is lost to the cache",
        "memsvc.core.sliding:release_outside",
        "memory.settle(blocks)",
        "memory.settle(blocks) & False",
        "a_window_that_moves_lets_go_of_what_is_behind",
    ),
    Mutant(
        "the null block is dropped with the others",
        "memsvc.core.table:TableRecord.held_block_ids",
        "return held if held.all() else held[held != 0]",
        "return held",
        "a_window_that_moves_lets_go_of_what_is_behind",
    ),
    Mutant(
        "the null block is referenced by a hit",
        "memsvc.core.content:PrefixMatch.found",
        "self.blocks[self.blocks > 0]",
        "self.blocks",
        "a_hit_needs_the_window_alone",
    ),
    Mutant(
        "a hit needs the whole prefix",
        f"{_MEMORY}._match",
        "if self.window:",
        "if False:",
        "a_hit_needs_the_window_alone",
    ),
    Mutant(
        "a hit goes on behind a gap in the window",
        "memsvc.core.prefix:PrefixIndex.match_window",
        "if run >= min(needed, position):",
        "if run:",
        "a_hit_needs_the_window_alone",
    ),
    Mutant(
        "a prompt takes blocks for all its tokens at once",
        "memsvc.core.sliding:entry_count",
        "if spec.window",
        "if False",
        "a_prompt_takes_no_more_than_its_window",
    ),
    Mutant(
        "a prompt longer than the pool can never be served, whatever the window",
        f"{_MEMORY}.admit",
        "self._require_possible(token_count, min(block_count, self.spec.sequence_block_limit))",
        "self._require_possible(token_count, block_count)",
        "a_prompt_takes_no_more_than_its_window",
    ),
    Mutant(
        "growth that is told again after its release is refused",
        f"{_WRITER}._check_appended_each",
        "if index < self._memory.tables.released[slot]:",
        "if False:",
        "what_is_told_again_of_released_blocks_is_nothing_new",
    ),
    Mutant(
        "tokens that are told again after their release are compared with nothing",
        f"{_WRITER}._check_known",
        "int(self._memory.tables.released[slot]) * self._size - start",
        "0",
        "what_is_told_again_of_released_blocks_is_nothing_new",
    ),
    Mutant(
        "the window is one position too narrow",
        "quire.window:outside_block_count",
        "(written - window + 1) // block_size",
        "(written - window + 2) // block_size",
        "what_is_outside_is_what_nobody_reads",
    ),
    Mutant(
        "a chunk of a prompt is planned without blocks for it",
        f"{_SCHEDULER}._grow_chunk",
        "return min(count, sequence.room - sequence.scheduled)",
        "return count",
        "a_long_prompt_grows_as_its_window_moves",
    ),
    Mutant(
        "a prompt asks for blocks only when it has none",
        "gateway.core.lease:GrowthLease.demand_ahead",
        "wanted += max(0, div_ceil(sequence.scheduled + count - sequence.room, self._size))",
        "pass",
        "a_long_prompt_grows_as_its_window_moves",
    ),
    Mutant(
        "the gateway keeps blocks that memory has given away",
        f"{_SCHEDULER}._report",
        "if self._window:",
        "if False:",
        "both_sides_release_at_the_same_token",
    ),
    Mutant(
        "memory hears of a window only when a block fills",
        "gateway.core.scheduler:report_at",
        "if window:",
        "if False:",
        "both_sides_release_at_the_same_token",
    ),
    Mutant(
        "a fork may begin where its window was released",
        "memsvc.core.fork:_position",
        "if not least <= at_token <= written:",
        "if not 1 <= at_token <= written:",
        "a_fork_begins_where_its_window_is_whole",
    ),
    Mutant(
        "what was offered for a released block is held for ever",
        "memsvc.core.sliding:release_outside",
        "offered = [record.merges.pop(index) for index in range(start, end) if index in record.merges]",
        "offered = []",
        "an_offer_for_a_released_block_is_over",
    ),
    Mutant(
        "an offer that is taken up after the release breaks the connection",
        "memsvc.core.replacement:check",
        "if index < memory.tables.released[slot]:",
        "if False:",
        "an_offer_for_a_released_block_is_over",
    ),
)
