"""Forks for the further samples of a request: tables that name the blocks of the first sample's prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import dataclasses
from typing import TYPE_CHECKING

import structlog

from quire.errors import InvariantError, QuireError
from quire.memory import CloseReason, Fork, ForkRequest, JournalEntry, Memory, PoolInfo

if TYPE_CHECKING:
    from gateway.core.scheduler import Scheduler
    from gateway.core.sequence import Sequence

log = structlog.get_logger(__name__)


class Forking:
    """Forks tables within one session of a lane.

    Args:
        pool: the session's pool.
        memory: where tables come from.
        scheduler: of the session.
        write_journal: sends an entry, with what waits to be told before it.
        is_current: whether the session still lasts.
    """

    def __init__(
        self,
        pool: PoolInfo,
        memory: Memory,
        scheduler: Scheduler,
        write_journal: Callable[[JournalEntry], None],
        is_current: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._scheduler = scheduler
        self._write_journal = write_journal
        self._is_current = is_current

    async def begin(self, source: Sequence, samples: list[Sequence], taken: int = 0) -> list[Sequence]:
        """Has samples run on the blocks of `source`, as many as there is room for.

        Args:
            source: a sequence that is held where the samples begin.
            samples: each with one token behind what they share.
            taken: places that others are about to take.

        Returns:
            The samples that hold no table: those that are to be queued, and those that have ended.
        """
        scheduler = self._scheduler
        living = [index for index, sample in enumerate(samples) if not sample.ended]
        # Tables are numbered on from the first sample: one that has ended between others gets one too, for a moment.
        count = min(living[-1] + 1 if living else 0, max(0, scheduler.free_count - taken))
        if not count or not scheduler.holds(source):
            return samples
        request = ForkRequest(
            pool_id=self._pool.pool_id,
            epoch=self._pool.epoch,
            table=source.table,
            count=count,
            at_token=len(samples[0].tokens) - 1,
            first_sample_index=samples[0].index,
        )
        scheduler.forking_count += count
        try:
            fork = await self._memory.fork(request)
        except InvariantError:
            raise
        except QuireError as error:
            log.debug("fork_refused", reason=error.reason, message=error.message)
            return samples
        finally:
            scheduler.forking_count -= count
        return self._take_in(request.table, samples, fork)

    def _take_in(self, source: int, samples: list[Sequence], fork: Fork) -> list[Sequence]:
        """Starts the samples that got tables; closes the tables of those that ended, or whose session did."""
        current = self._is_current()
        pairs = list(zip(samples, fork.tables, strict=False))
        begun = [(sample, table) for sample, table in pairs if current and not sample.ended]
        unused = [table for sample, table in pairs if not current or sample.ended]
        if unused:
            reasons = [CloseReason.CANCELLED] * len(unused)
            self._write_journal(JournalEntry(self._pool.pool_id, fork.epoch, closed=unused, close_reasons=reasons))
        if begun:
            tables = [table for _, table in begun]
            self._scheduler.now = asyncio.get_running_loop().time()
            self._scheduler.fork(source, [sample for sample, _ in begun], dataclasses.replace(fork, tables=tables))
        started = {sample for sample, _ in begun}
        return [sample for sample in samples if sample not in started]
