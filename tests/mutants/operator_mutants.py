"""The rules of what operators command, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_CORE: Final = "memsvc.core.memory:MemoryCore"
_POOL: Final = "memsvc.core.pool:BlockPool"
_MEMORY: Final = "memsvc.core.pool_memory:PoolMemory"

RESET: Final = (
    Mutant(
        "a reset takes the blocks of running sequences",
        f"{_MEMORY}.reset",
        "if self.tables.open_count:",
        "if False:",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "what was cached before a reset still matches",
        f"{_MEMORY}.reset",
        "self.prefix.clear()",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "nobody is told that nothing matches any more",
        "memsvc.core.prefix:PrefixIndex.clear",
        "self.events.append(CacheCleared())",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "a forced reset does not raise the epoch",
        f"{_CORE}.reset_cache",
        "if not pool.epoch < epoch <= EPOCH_MAXIMUM:",
        "if epoch > EPOCH_MAXIMUM:",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "gateways are not told of a forced reset",
        f"{_CORE}.reset_cache",
        "self._events.append(PoolChanged(pool_id))",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "blocks that a reset cleared are lost",
        f"{_POOL}.clear_cached",
        "self._blank.put(blocks)",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
)

MUTANTS: Final = RESET
