"""Applies journals to the memory of a pool: first everything is checked, then everything is applied.

The usual row of a decode step (one new token, in a block that is there) is handled in vector operations over all rows.
Rows that do more are handled one by one. Where there is an accelerator (`quire.native`), it applies journals in which
nothing is out of the ordinary, and leaves all others, those that are wrong among them, to what is here.
"""

from __future__ import annotations

from array import array
import dataclasses
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from memsvc.core import replacement, sliding
from memsvc.core.content import FreshContent
from memsvc.core.journal import Column, Journal, JournalColumns
from memsvc.core.pool import BlockState
from memsvc.core.replacement import Replacement
from memsvc.core.rows import NO_GROWTH, Growth, Rows, merged
from memsvc.core.table import Slots, TableRecord
from memsvc.core.usual_journal import apply_rows
from quire import native
from quire.errors import QuireError, StaleEpochError
from quire.memory import CloseReason
from quire.units import div_ceil

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory


def _refuse(message: str, reason: str, field: str) -> NoReturn:
    """Raises: the journal does not fit the state it meets."""
    raise StaleEpochError(message, reason=reason, field=field)


@dataclasses.dataclass(slots=True)
class _Plan:
    """A checked journal. `single`: rows that give just the next token."""

    growth: Growth
    rows: Rows
    single: npt.NDArray[np.bool_]
    closed: list[tuple[int, CloseReason]]
    returned: Column
    replaced: list[Replacement]


class JournalWriter:
    """Applies journals.

    Args:
        memory: what they are applied to.
    """

    def __init__(self, memory: PoolMemory) -> None:
        self._memory = memory
        self._size = memory.spec.block_size
        # The last sampled token of a sequence is known but never computed, and may come before its block.
        self._token_limit = memory.spec.max_model_len + self._size
        self._block_limit = div_ceil(self._token_limit, self._size)

    def apply(self, gateway: int, journal: Journal, now: float) -> None:
        """Applies `journal`, in the order appended, replaced, rows, closed, returned.

        Raises:
            InvalidRequestError: columns do not fit one another.
            StaleEpochError: a row does not fit the state: a gap, other tokens than known, a block that is not leased to
                this gateway, a table of another one, a write into a block that others share. Nothing was changed.
        """
        # Tables in a sliding window have null entries, of which the accelerator knows nothing.
        usual = native.accelerator is not None and not self._memory.window
        if usual and self._apply_natively(gateway, journal, now):
            return
        columns = journal.columns()
        columns.check()
        plan = self._check(gateway, columns)
        if len(plan.growth.slots):
            self._grow(gateway, plan.growth, now)
        if plan.replaced:
            replacement.apply(self._memory, gateway, plan.replaced, now)
        if plan.closed and self._memory.shared:
            # Rows may tell of what the last holder has written since the others were fenced.
            for slot, _ in plan.closed:
                self._memory.leave_shared(self._memory.tables.record(slot))
        if len(plan.rows.slots):
            self._apply_tokens(plan)
            self._apply_written(plan.rows, now)
            if self._memory.window:
                sliding.release_outside(self._memory, plan.rows.slots, now)
        self._end(gateway, plan.closed, plan.returned, now)

    def _end(self, gateway: int, closed: list[tuple[int, CloseReason]], returned: Column, now: float) -> None:
        """Closes tables and takes leased blocks back."""
        for slot, reason in closed:
            self._memory.close(slot, reason, now)
        if len(returned):
            self._memory.pool.put_back(returned, now)
            self._memory.grants_of(gateway).leased -= len(returned)

    def _apply_natively(self, gateway: int, journal: Journal, now: float) -> bool:
        """Applies a journal in which all is as usual; false, with nothing changed, if it is not such a one."""
        limits = (self._token_limit, self._block_limit)
        if not (len(journal.closed) or len(journal.close_reasons) or len(journal.returned)):
            return apply_rows(self._memory, gateway, journal, now, *limits)
        columns = journal.columns()
        try:
            columns.check()
            closed = self._check_closed(gateway, columns)
            if len(columns.returned):
                self._check_returned(gateway, columns.returned, set(columns.appended[:, 2].tolist()))
        except QuireError:
            # Said again, in its turn, by the checks that look at everything.
            return False
        if not apply_rows(self._memory, gateway, columns, now, *limits):
            return False
        self._end(gateway, closed, columns.returned, now)
        return True

    # Checking

    def _check(self, gateway: int, journal: JournalColumns) -> _Plan:
        growth = self._check_appended(gateway, journal.appended) if len(journal.appended) else NO_GROWTH
        closed = self._check_closed(gateway, journal) if len(journal.closed) else []
        writable: set[int] = set()
        replaced: list[Replacement] = []
        taken: set[int] = set(growth.blocks.tolist()) if len(journal.returned) or len(journal.replaced) else set()
        if len(journal.replaced) or self._memory.shared:
            slots = [self._owned_slot(gateway, table, "replaced") for table in journal.replaced[:, 0].tolist()]
            closing = [slot for slot, _ in closed]
            replaced, writable = replacement.check(self._memory, gateway, (journal.replaced, slots), closing, taken)
        rows = self._select_rows(gateway, journal)
        single = self._check_rows(rows, growth, writable)
        if len(journal.returned):
            self._check_returned(gateway, journal.returned, taken)
        return _Plan(growth, rows, single, closed, journal.returned, replaced)

    def _owned_slot(self, gateway: int, table: int, field: str) -> int:
        """Returns the slot of `table`, -1 if it is closed; refuses one that never was or is another gateway's."""
        tables = self._memory.tables
        slot = tables.slot(table)
        if slot < 0:
            if table >= tables.next_counter or table == 0:
                _refuse(f"{field}: table {table} was never opened in this epoch", "UNKNOWN_TABLE", field)
        elif tables.gateway[slot] != gateway:
            _refuse(f"{field}: table {table} belongs to another gateway", "FOREIGN_TABLE", field)
        return slot

    def _check_appended(self, gateway: int, appended: Column) -> Growth:
        """Returns the new blocks; those that a table has already are left out."""
        pool, tables = self._memory.pool, self._memory.tables
        slots, blocks = tables.slots(appended[:, 0]), appended[:, 2]
        # The usual case: every table gets its next block, which is leased to this gateway.
        usual = (
            slots.min() >= 0
            and blocks.min() > 0
            and blocks.max() < pool.block_count
            and (appended[:, 1] == tables.length[slots]).all()
            and (tables.gateway[slots] == gateway).all()
            and (pool.lessee[blocks] == gateway).all()
            and appended[:, 1].max() < self._block_limit
            and not tables.has_repeats(slots)
            and len(set(blocks.tolist())) == len(blocks)
        )
        return Growth(slots, blocks) if usual else self._check_appended_each(gateway, appended)

    def _check_appended_each(self, gateway: int, appended: Column) -> Growth:
        """Checks growth row by row; see `_check_appended`."""
        pool, tables = self._memory.pool, self._memory.tables
        growth: dict[int, list[int]] = {}
        taken: set[int] = set()
        inside = (appended[:, 2] > 0) & (appended[:, 2] < pool.block_count)
        holders = np.where(inside, pool.lessee[np.where(inside, appended[:, 2], 0)], 0).tolist()
        slots = tables.slots(appended[:, 0])
        owners = np.where(slots >= 0, tables.gateway[slots], 0).tolist()
        rows = zip(appended.tolist(), slots.tolist(), owners, holders, strict=True)
        for (table, index, block), slot, owner, holder in rows:
            if owner != gateway and self._owned_slot(gateway, table, "appended") < 0:
                continue
            blocks = tables.record(slot).blocks
            new = growth.get(slot, ())
            length = len(blocks) + len(new)
            if index < length:
                if index < self._memory.tables.released[slot]:
                    continue
                if (blocks[index] if index < len(blocks) else new[index - len(blocks)]) != block:
                    _refuse(f"appended: table {table} has another block at {index}", "BLOCK_MISMATCH", "appended")
                continue
            if index > length or index >= self._block_limit:
                _refuse(
                    f"appended: table {table} has {length} blocks, index {index} is not the next or is above "
                    f"{self._block_limit - 1}",
                    "BLOCK_GAP",
                    "appended",
                )
            if holder != gateway or block in taken:
                _refuse(f"appended: block {block} is not leased to this gateway", "BLOCK_NOT_LEASED", "appended")
            taken.add(block)
            growth.setdefault(slot, []).append(block)
        owned = [slot for slot, new in growth.items() for _ in new]
        return Growth(np.array(owned, np.int64), np.array([b for new in growth.values() for b in new], np.int64))

    def _select_rows(self, gateway: int, journal: JournalColumns) -> Rows:
        """Returns the rows whose tables are open, several of one table merged."""
        tables = self._memory.tables
        counts = journal.token_counts
        offsets = counts.cumsum() - counts
        slots = tables.slots(journal.tables)
        starts, written = journal.token_starts, journal.written_counts
        if len(slots) and slots.min() < 0:
            for table in journal.tables[slots < 0].tolist():
                self._owned_slot(gateway, table, "tables")
            live = slots >= 0
            slots, starts, counts = slots[live], starts[live], counts[live]
            offsets, written = offsets[live], written[live]
        if len(slots) and not (tables.gateway[slots] == gateway).all():
            table = int(tables.counter[slots[tables.gateway[slots] != gateway][0]])
            _refuse(f"tables: table {table} belongs to another gateway", "FOREIGN_TABLE", "tables")
        rows = Rows(slots, starts, counts, offsets, written, journal.token_ids)
        return merged(rows, tables) if tables.has_repeats(slots) else rows

    def _check_rows(self, rows: Rows, growth: Growth, writable: set[int]) -> npt.NDArray[np.bool_]:
        """Checks rows and returns which of them give just the next token.

        `writable`: tables that share their open block now, and will not when the rows are applied.
        """
        tables = self._memory.tables
        slots = rows.slots
        known = tables.tokens[slots]
        ends = rows.starts + rows.counts
        single: npt.NDArray[np.bool_] = (rows.starts == known) & (rows.counts == 1)
        unusual = (rows.counts > 0) & ~(single & (tables.token_block[slots] > 0))
        after = np.maximum(known, ends)
        before = tables.written[slots]
        bad = (rows.starts > known) | (ends > self._token_limit) | (rows.written < before) | (rows.written > after)
        if bad.any():
            at = int(bad.argmax())
            _refuse(
                f"tables: table {int(tables.counter[slots[at]])} has {int(known[at])} tokens known and "
                f"{int(before[at])} written; the row gives tokens {int(rows.starts[at])} .. {int(ends[at])} and "
                f"{int(rows.written[at])} written; at most {self._token_limit} tokens are allowed",
                "ROW_MISMATCH",
                "tables",
            )
        there = tables.write_block[slots] > 0
        moved = ((rows.written // self._size != before // self._size) | ~there) & (rows.written > before)
        doubtful = np.flatnonzero(unusual | moved)
        if len(doubtful):
            self._check_room(rows, doubtful, growth.counts())
            if self._memory.shared:
                replacement.check_writes(self._memory, rows.slots[doubtful], rows.written[doubtful], writable)
        return single

    def _check_room(self, rows: Rows, doubtful: Column, growth: dict[int, int]) -> None:
        """Refuses rows that give or confirm tokens for which the table has no blocks, or other tokens than known."""
        tables, size = self._memory.tables, self._size
        slots = rows.slots[doubtful]
        known = tables.tokens[slots]
        columns = (slots, rows.starts[doubtful], rows.counts[doubtful], rows.written[doubtful], known)
        lengths = tables.length[slots].tolist()
        listed = zip(doubtful.tolist(), lengths, *(column.tolist() for column in columns), strict=True)
        for at, length, slot, start, count, written, before in listed:
            length += growth.get(slot, 0)  # noqa: PLW2901 - what it will be
            if written > length * size:
                message = (
                    f"written_counts: table {int(tables.counter[slot])} has {length} blocks, not room for {written}"
                )
                _refuse(message, "ROW_MISMATCH", "written_counts")
            if count and start + count > max(before, (length + 1) * size):
                table = int(tables.counter[slot])
                message = f"token_ids: table {table} has {length} blocks, token {start + count} is too far ahead"
                _refuse(message, "ROW_MISMATCH", "token_ids")
            if count and start < before:
                self._check_known(rows, at, slot, min(before, start + count))

    def _check_known(self, rows: Rows, at: int, slot: int, end: int) -> None:
        """Refuses a row whose tokens before `end` are not those known."""
        start, offset = int(rows.starts[at]), int(rows.offsets[at])
        # What was in released blocks is not known any more.
        skipped = max(0, int(self._memory.tables.released[slot]) * self._size - start)
        start, offset = start + skipped, offset + skipped
        if start < end and rows.tokens[offset : offset + end - start].tolist() != self.known_tokens(slot, start, end):
            table = int(self._memory.tables.counter[slot])
            message = f"token_ids: table {table} has other tokens at {start} .. {end}"
            _refuse(message, "TOKEN_MISMATCH", "token_ids")

    def _check_closed(self, gateway: int, journal: JournalColumns) -> list[tuple[int, CloseReason]]:
        closed: dict[int, CloseReason] = {}
        for table, reason in zip(journal.closed.tolist(), journal.close_reasons.tolist(), strict=True):
            slot = self._owned_slot(gateway, table, "closed")
            if slot >= 0:
                closed.setdefault(slot, CloseReason(reason))
        return list(closed.items())

    def _check_returned(self, gateway: int, returned: Column, taken: set[int]) -> None:
        pool = self._memory.pool
        inside = (returned > 0) & (returned < pool.block_count)
        blocks = np.where(inside, returned, 0)
        good = inside & (pool.lessee[blocks] == gateway) & (pool.state[blocks] == BlockState.LEASED)
        if not good.all():
            block = int(returned[int(good.argmin())])
            _refuse(f"returned: block {block} is not leased to this gateway", "BLOCK_NOT_LEASED", "returned")
        values = returned.tolist()
        if len(set(values)) != len(values) or not taken.isdisjoint(values):
            _refuse("returned: a block is given twice or is also appended", "BLOCK_NOT_LEASED", "returned")

    # Applying

    def known_tokens(self, slot: int, start: int, end: int) -> list[int]:
        """Returns the tokens [start, end) of a table."""
        record = self._memory.tables.record(slot)
        in_blocks = int(self._memory.tables.tokens[slot]) - len(record.overflow)
        first, last = start // self._size, div_ceil(min(end, in_blocks), self._size)
        found: list[int] = []
        if last > first:
            blocks = np.array(record.blocks[first:last])
            stored = self._memory.prefix.tokens[blocks].reshape(-1)
            found = stored[start - first * self._size : min(end, in_blocks) - first * self._size].tolist()
        return found + record.overflow[max(0, start - in_blocks) : max(0, end - in_blocks)]

    def _grow(self, gateway: int, growth: Growth, now: float) -> None:
        """Appends leased blocks to tables, and moves tokens that waited for them."""
        tables, pool = self._memory.tables, self._memory.pool
        owners, blocks = growth.slots, growth.blocks
        waiting: list[int] = []
        for slot, block in zip(owners.tolist(), blocks.tolist(), strict=True):
            record = tables.record(slot)
            record.blocks.append(block)
            if record.overflow and slot not in waiting:
                waiting.append(slot)
        np.add.at(tables.length, owners, 1)
        pool.adopt(blocks, now)
        pool.tenant[blocks] = tables.tenant_tag[owners]
        if pool.tenancy is not None:
            pool.tenancy.entered(blocks, pool.tenancy.numbers(tables.tenant_tag[owners]))
        self._memory.grants_of(gateway).leased -= len(blocks)
        # Where a table was full up to its end, the first new block is the one that is open now.
        first = np.concatenate(([True], owners[1:] != owners[:-1]))
        owners, blocks = owners[first], blocks[first]
        for column in (tables.token_block, tables.write_block):
            column[owners] = np.where(column[owners] == 0, blocks, column[owners])
        if self._memory.shared:
            for slot in set(owners.tolist()):
                self._memory.refresh_open_blocks(slot)
        for slot in waiting:
            record = tables.record(slot)
            tokens, record.overflow = array("I", record.overflow), []
            before = int(tables.tokens[slot]) - len(tokens)
            tables.token_block[slot] = self.append_tokens(slot, before, memoryview(tokens))

    def append_tokens(self, slot: int, known: int, tokens: memoryview) -> int:
        """Adds tokens (u32) after the `known` ones; returns the block in which the next one goes, 0 for none yet."""
        size, words = self._size, self._memory.prefix.token_words
        record = self._memory.tables.record(slot)
        if record.overflow:
            record.overflow.extend(tokens)
            return 0
        blocks = record.blocks
        length, end, done = len(blocks), known + len(tokens), 0
        index, offset = divmod(known, size)
        while known < end and index < length and index != record.shared_index:
            count = min(size - offset, end - known)
            first = blocks[index] * size + offset
            words[first : first + count] = tokens[done : done + count]
            done += count
            known += count
            index, offset = (index + 1, 0) if offset + count == size else (index, offset + count)
        if known < end:
            record.overflow.extend(tokens[done:])
            return 0
        return blocks[index] if index < length else 0

    def _append_rows(self, rows: Rows, at: Slots) -> None:
        """Adds the tokens of the rows `at`, those left out that are known."""
        tables = self._memory.tables
        given = rows.tokens.astype(np.uint32).data
        slots, offsets = rows.slots[at], rows.offsets[at]
        known = tables.tokens[slots]
        ends = np.maximum(rows.starts[at] + rows.counts[at], known)
        firsts = offsets + known - rows.starts[at]
        listed = zip(slots.tolist(), known.tolist(), firsts.tolist(), (ends - known).tolist(), strict=True)
        tables.token_block[slots] = [
            self.append_tokens(slot, before, given[first : first + count]) if count else self.token_block(slot, before)
            for slot, before, first, count in listed
        ]
        tables.tokens[slots] = ends

    def token_block(self, slot: int, position: int) -> int:
        """Returns the block in which the next token goes, or 0 if it has to wait, as those before it do."""
        return 0 if self._memory.tables.record(slot).overflow else self.open_block(slot, position)

    def open_block(self, slot: int, position: int) -> int:
        """Returns the block that a table writes a position into, or 0."""
        record = self._memory.tables.record(slot)
        index = position // self._size
        return record.blocks[index] if index < len(record.blocks) and index != record.shared_index else 0

    def _apply_tokens(self, plan: _Plan) -> None:
        tables, rows = self._memory.tables, plan.rows
        slots, offsets = rows.slots, rows.offsets
        plain = plan.single & (tables.token_block[slots] > 0)
        if not plain.all():
            self._append_rows(rows, np.flatnonzero(~plain & (rows.counts > 0)))
            if not plain.any():
                return
            slots, offsets = slots[plain], offsets[plain]
        known = tables.tokens[slots]
        flat = self._memory.prefix.tokens.reshape(-1)
        flat[tables.token_block[slots] * self._size + known % self._size] = rows.tokens[offsets]
        known += 1
        tables.tokens[slots] = known
        filled = known % self._size == 0
        for slot, position in zip(slots[filled].tolist(), known[filled].tolist(), strict=True):
            tables.token_block[slot] = self.open_block(slot, position)

    def _apply_written(self, rows: Rows, now: float) -> None:
        tables = self._memory.tables
        slots = rows.slots
        before = tables.written[slots]
        floors = tables.written_floor[slots]
        written = rows.written
        if floors.any():
            written = np.where(written > floors, written, before)
            for slot in slots[(written > floors) & (floors > 0)].tolist():
                self._memory.release_copy_source(slot, now)
            moved = (floors == 0) | (written > floors)
            slots, before, written = slots[moved], before[moved], written[moved]
        blocks = tables.write_block[slots]
        within = (written // self._size == before // self._size) & (blocks > 0)
        tables.written[slots] = written
        if within.all():
            self._memory.pool.filled[blocks] = written % self._size
            return
        self._memory.pool.filled[blocks[within]] = written[within] % self._size
        moved = np.flatnonzero(~within & (written > before))
        if len(moved):
            self._commit(slots[moved], written[moved], now)

    def _commit(self, slots: Slots, written: Column, now: float) -> None:
        """Publishes the blocks of tables that became full, and moves on to the blocks that are written next."""
        memory, tables, size = self._memory, self._memory.tables, self._size
        full: list[int] = []
        following: list[int] = []
        chained: list[TableRecord] = []
        fresh = FreshContent()
        last = written // size
        rows = zip(slots.tolist(), tables.committed[slots].tolist(), last.tolist(), strict=True)
        for slot, start, end in rows:
            record = tables.record(slot)
            held = record.blocks
            following.append(held[end] if end < len(held) else 0)
            if end == start + 1 and not record.extras:
                full.append(held[start])
                if record.publishes:
                    fresh.expect(held[start], record.parent, held[start - 1] if start else 0, start)
                    chained.append(record)
            elif end > start:
                blocks = held[start:end].tolist()
                full += blocks
                if record.publishes:
                    identities = memory.prefix.chain(record.parent, blocks, start, record.extras)
                    fresh.add(blocks, record.parent, identities, held[start - 1] if start else 0, start)
                    fresh.with_extra += [held[index] for index in range(start, end) if index in record.extras]
                    record.parent = identities[-1]
        if chained:
            for record, identity in zip(chained, memory.prefix.identify(fresh), strict=True):
                record.parent = identity
        if full:
            memory.pool.filled[full] = size
            tables.committed[slots] = last
        opened, rest = np.array(following, np.int64), written % size
        memory.pool.filled[opened[rest > 0]] = rest[rest > 0]
        tables.write_block[slots] = opened
        if fresh.blocks:
            memory.publish(fresh, lambda: slots, now)
