"""The rules of forks and merges, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_FORK: Final = "memsvc.core.fork"
_MEMORY: Final = "memsvc.core.pool_memory:PoolMemory"
_REPLACEMENT: Final = "memsvc.core.replacement"
_WRITER: Final = "memsvc.core.writer:JournalWriter"

MUTANTS: Final = (
    Mutant(
        "a child names blocks without a reference",
        f"{_FORK}:fork",
        "memory.pool.share(blocks[blocks > 0], now)",
        "pass",
        "a_fork_shares_its_beginning_and_nothing_else",
    ),
    Mutant(
        "a fork shares what lies behind it",
        f"{_FORK}:fork",
        "source.blocks[: full + (rest > 0)]",
        "source.blocks[:]",
        "a_fork_shares_its_beginning_and_nothing_else",
    ),
    Mutant(
        "a fork goes beyond what is written",
        f"{_FORK}:_position",
        "least <= at_token <= written",
        "1 <= at_token <= int(tables.tokens[slot])",
        "a_fork_ends_where_its_source_is_written",
    ),
    Mutant(
        "a block is shared before the copy that fills it ran",
        f"{_FORK}:_position",
        "if source.copy_source:",
        "if False:",
        "a_fork_ends_where_its_source_is_written",
    ),
    Mutant(
        "a table writes into a block that another names",
        f"{_REPLACEMENT}:check_writes",
        "if record.shared_index < 0 or",
        "if True or",
        "a_first_write_copies_and_the_last_holder_writes_in_place",
    ),
    Mutant(
        "the source of a fork goes on writing into what it shares",
        f"{_FORK}:fork",
        "source.shared_index = full\n",
        "pass\n",
        "a_first_write_copies_and_the_last_holder_writes_in_place",
    ),
    Mutant(
        "who is left alone still may not write",
        f"{_FORK}:SharedBlocks.leave",
        "if len(holders) > 1:",
        "if holders:",
        "a_first_write_copies_and_the_last_holder_writes_in_place",
    ),
    Mutant(
        "a table that copied counts as a holder",
        f"{_REPLACEMENT}:_copy",
        "memory.leave_shared(record)",
        "memory.shared._by_table.pop(record.table)",
        "a_first_write_copies_and_the_last_holder_writes_in_place",
    ),
    Mutant(
        "who ends in a journal still counts as a holder in it",
        f"{_REPLACEMENT}:check",
        "departures.leave(record.table, record.blocks[record.shared_index])",
        "pass",
        "the_last_holder_writes_in_the_step_that_fenced_the_others",
    ),
    Mutant(
        "a write in place is applied before the others have left",
        f"{_WRITER}.apply",
        "if plan.closed and self._memory.shared:",
        "if False:",
        "the_last_holder_writes_in_the_step_that_fenced_the_others",
    ),
    Mutant(
        "the source of a first write is let go at once",
        f"{_REPLACEMENT}:_copy",
        "record.copy_source = old",
        "memory.pool.drop(np.array([old]), np.array([False]), now)",
        "what_a_first_write_copies_is_held_until_it_ran",
    ),
    Mutant(
        "the source of a first write is held for ever",
        f"{_REPLACEMENT}:_copy",
        "tables.written_floor[slot] = tables.written[slot]",
        "pass",
        "what_a_first_write_copies_is_held_until_it_ran",
    ),
    Mutant(
        "the target of a first write matches before the copy ran",
        f"{_MEMORY}._publish_tail",
        "record.shared_index >= 0 or record.copy_source",
        "record.shared_index >= 0",
        "what_a_first_write_copies_is_held_until_it_ran",
    ),
    Mutant(
        "tokens that are told early are written over those of others",
        f"{_WRITER}.append_tokens",
        "and index != record.shared_index",
        "",
        "tokens_told_early_belong_to_their_table",
    ),
    Mutant(
        "a copy forgets the tokens that it brings",
        f"{_REPLACEMENT}:_copy",
        "memory.prefix.tokens[replacement.block] = memory.prefix.tokens[old]",
        "pass",
        "tokens_told_early_belong_to_their_table",
    ),
    Mutant(
        "a child writes into the middle of a full block",
        f"{_FORK}:fork",
        "must_copy = full < committed or",
        "must_copy = False or",
        "a_full_block_is_never_written_to",
    ),
    Mutant(
        "a grandchild writes into the middle of a full block",
        f"{_FORK}:fork",
        "full < committed or (source.shared_index == full and not memory.shared.holders(shared[full]))",
        "full < committed",
        "a_full_block_is_never_written_to",
    ),
    Mutant(
        "a child's identities follow its source's last block",
        f"{_FORK}:fork",
        "if source.publishes and full < committed:",
        "if False:",
        "a_child_goes_on_behind_its_own_prefix",
    ),
    Mutant(
        "a child fills the cache although its source must not",
        f"{_FORK}:fork",
        "publishes=source.publishes",
        "publishes=True",
        "a_child_goes_on_behind_its_own_prefix",
    ),
    Mutant(
        "a block that was never leased takes the place of a shared one",
        f"{_REPLACEMENT}:check",
        "memory.pool.lessee[block] != gateway",
        "False",
        "only_what_was_granted_replaces_what_is_shared",
    ),
    Mutant(
        "any block may be replaced",
        f"{_REPLACEMENT}:check",
        "record.shared_index != index or ",
        "",
        "only_what_was_granted_replaces_what_is_shared",
    ),
    Mutant(
        "one leased block takes two places",
        f"{_REPLACEMENT}:check",
        "taken.add(block)",
        "pass",
        "only_what_was_granted_replaces_what_is_shared",
    ),
    Mutant(
        "an offered block is not held",
        f"{_MEMORY}._offer",
        "self.pool.share(np.array([kept]), now)",
        "pass",
        "equal_blocks_become_one",
    ),
    Mutant(
        "what was offered is held beyond its table's end",
        "memsvc.core.table:TableRecord.held_block_ids",
        "*self.merges.values()",
        "",
        "equal_blocks_become_one",
    ),
    Mutant(
        "whatever is offered for one entry may take the place of another",
        f"{_REPLACEMENT}:check",
        "record.merges.get(index) == block",
        "block in record.merges.values()",
        "equal_blocks_become_one",
    ),
    Mutant(
        "a fork begins with copies that are about to go",
        f"{_FORK}:fork",
        "if outside <= index < full:",
        "if False:",
        "equal_blocks_become_one",
    ),
    Mutant(
        "a copy that was merged is still counted as one",
        f"{_REPLACEMENT}:_merge",
        "memory.prefix.forget(old)",
        "pass",
        "equal_blocks_become_one",
    ),
    Mutant(
        "the gateway has the last holder copy",
        "gateway.core.sharing:SharedTails.left",
        "if len(holders) == 1:",
        "if False:",
        "the_gateway_knows_who_shares",
    ),
    Mutant(
        "the gateway forgets that the source shares too",
        "gateway.core.sharing:SharedTails.forked",
        "{source, *children}",
        "{*children}",
        "the_gateway_knows_who_shares",
    ),
    Mutant(
        "the gateway has a child write into a full block",
        "gateway.core.sharing:SharedTails.forked",
        "if must_copy:",
        "if False:",
        "the_gateway_knows_who_shares",
    ),
)
