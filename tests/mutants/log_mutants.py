"""The rules of the command log and of snapshots, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_CORE: Final = "memsvc.core.memory:MemoryCore"
_COPIER: Final = "memsvc.core.snapshot:_Copier"
_LOG: Final = "memsvc.core.log:CommandLog"
_STATE: Final = "the_log_gives_the_state_back"

LOG: Final = (
    Mutant(
        "a command is not taken down",
        f"{_CORE}.touch_gateway",
        "@command()\n",
        "",
        _STATE,
    ),
    Mutant(
        "a refusal that recalled blocks is not taken down",
        f"{_CORE}.admit",
        "leaves_traces=BlockPoolExhaustedError",
        "",
        _STATE,
    ),
    Mutant(
        "a prompt that is looked up changes what is known",
        "memsvc.core.pool_memory:PoolMemory.locate",
        "self.prefix.collision_count = counted",
        "self.prefix.collision_count = counted + 1",
        _STATE,
    ),
    Mutant(
        "an entry forgets its time",
        f"{_LOG}.append",
        "(command, args, kwargs or None, refused)",
        "(command, tuple(0.0 if isinstance(item, float) else item for item in args), kwargs or None, refused)",
        _STATE,
    ),
    Mutant(
        "a snapshot leaves the free order out",
        f"{_COPIER}._fill",
        "fields.items():",
        "[item for item in fields.items() if item[0] not in {'_head', '_tail', '_fresh'}]:",
        _STATE,
    ),
    Mutant(
        "a snapshot leaves the links of forgotten blocks out",
        f"{_COPIER}._fill",
        "fields.items():",
        "[item for item in fields.items() if item[0] != '_linked']:",
        _STATE,
    ),
    Mutant(
        "a snapshot shares the tables' columns with the core",
        f"{_COPIER}._copy",
        "return value.copy()",
        "return value",
        _STATE,
    ),
    Mutant(
        "a gateway is two after a snapshot",
        f"{_COPIER}._copy_object",
        "if made is not None:",
        "if False:",
        _STATE,
    ),
    Mutant(
        "a segment relies on roots that an older one told of",
        f"{_LOG}.rotate",
        "self._core.forget_roots()",
        "pass",
        _STATE,
    ),
    Mutant(
        "a full log drops commands and keeps the old snapshot",
        f"{_LOG}._weigh",
        "self.rotate()",
        "del lines[: len(lines) // 2]",
        "a_full_log_still_covers_its_commands",
    ),
    Mutant(
        "a log never forgets",
        f"{_LOG}.rotate",
        "del self.segments[: len(dropped)]",
        "pass",
        "a_full_log_still_covers_its_commands",
    ),
    Mutant(
        "a snapshot that is read is overwritten",
        f"{_LOG}.rotate",
        "not dropped[0].readers",
        "True",
        "who_reads_a_log_is_not_disturbed",
    ),
    Mutant(
        "history tells how a block is after a command as how it was before",
        "memsvc.core.history_watches:BlockWatch.compare",
        "self._before = after",
        "pass",
        "history_tells_of_blocks_and_sequences",
    ),
    Mutant(
        "history does not see a table close",
        "memsvc.core.history_watches:SequenceWatch.compare",
        "changes.append(Change(before, None, name, text))",
        "pass",
        "history_tells_of_blocks_and_sequences",
    ),
)
