"""Rules of the accelerator, each taken out once in its C source, and an extension built without it."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
from pathlib import Path
import subprocess
import sysconfig
from typing import Final, cast

from quire import native

SOURCES: Final = Path(native.__file__).parent
_NAME: Final = "quire.native._accelerator"


@dataclasses.dataclass(frozen=True)
class NativeMutant:
    """A source file with one rule removed: `old`, which is there exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


NATIVE: Final = (
    NativeMutant(
        "a table grows by a block that is not leased to its gateway",
        "journal.c",
        "blocks->lessee[block] != call->gateway || blocks->state[block] != STATE_LEASED",
        "blocks->state[block] != STATE_LEASED",
    ),
    NativeMutant("a table grows past a gap", "journal.c", "at != tables->length[slot]", "at < tables->length[slot]"),
    NativeMutant(
        "a refused journal keeps its growth",
        "journal.c",
        "undo_growth(call, call->growth_count);\n        return",
        "return",
    ),
    NativeMutant(
        "tables of other gateways advance",
        "journal.c",
        "tables->gateway[slot] == call->gateway",
        "tables->gateway[slot] > 0",
    ),
    NativeMutant(
        "a table that has the place of a closed one advances",
        "journal.c",
        "tables->counter[slot] == table;",
        "tables->counter[slot] >= 0;",
    ),
    NativeMutant("other tokens than known are taken", "journal.c", "row->count > 0 && start != row->known", "0"),
    NativeMutant(
        "what was written is unwritten",
        "journal.c",
        "row->written >= tables->written[row->slot] &&",
        "row->written >= 0 &&",
    ),
    NativeMutant(
        "more is written than is known", "journal.c", "row->written <= row->after && ", "row->written <= room && "
    ),
    NativeMutant(
        "a copy's source is forgotten before it was copied", "journal.c", "&& tables->written_floor[row->slot] == 0", ""
    ),
    NativeMutant("sequences that keep to themselves publish", "journal.c", "return wanted <= 0 ? wanted :", "return"),
    NativeMutant(
        "a row of a table that is given twice counts once",
        "journal.c",
        "row->slot < 0 || tables->seen[row->slot] == tables->call",
        "row->slot < 0",
    ),
    NativeMutant(
        "equal content is published twice",
        "index.c",
        "*other = block_of(self, identity);",
        "*other = 0; (void)block_of;",
    ),
    NativeMutant(
        "a block that is published anew stays under its old name",
        "index.c",
        "if (unlink_block(self, int_at(args[0], row)) < 0)",
        "if (0 && unlink_block(self, int_at(args[0], row)) < 0)",
    ),
    NativeMutant(
        "a hint is believed unseen",
        "index.c",
        "memcmp(block_tokens(self, block), (const uint8_t *)words.buf + start * stride, (size_t)stride) != 0",
        "0",
    ),
    NativeMutant(
        "a block of another prefix is matched",
        "index.c",
        "memcmp(digest_at(self->parents, block), before, DIGEST_BYTES) != 0",
        "0",
    ),
    NativeMutant(
        "a block that was forgotten is matched", "index.c", "self->published[block] != PUBLICATION_FULL || self", "self"
    ),
    NativeMutant(
        "a block's new life has the generation of the old one",
        "blocks.c",
        "generation[block] += 1",
        "generation[block] += 0",
    ),
    NativeMutant(
        "what nobody can match stays cached", "blocks.c", "keep[i] ? STATE_CACHED : STATE_FREE", "STATE_CACHED"
    ),
)


class Builder:
    """Builds accelerators; what a mutant leaves alone is compiled once.

    Args:
        folder: where everything goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        # As it is shipped: a warning is an error.
        self._objects = {path.name: self._compile(path, "-Wall", "-Wextra", "-Werror") for path in SOURCES.glob("*.c")}

    def build(self, mutant: NativeMutant | None = None) -> native.Accelerator:
        """Builds and loads an accelerator.

        Raises:
            LookupError: the mutant's text is not in its file exactly once.
            subprocess.CalledProcessError: it does not build.
        """
        objects = dict(self._objects)
        self._count += 1
        if mutant is not None:
            text = (SOURCES / mutant.file).read_text()
            if text.count(mutant.old) != 1:
                raise LookupError(f"{mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
            source = self._folder / f"{self._count}.c"
            source.write_text(text.replace(mutant.old, mutant.new))
            # It may leave something unused.
            objects[mutant.file] = self._compile(source, "-w")
        target = self._folder / f"{self._count}{sysconfig.get_config_var('EXT_SUFFIX')}"
        _run("cc", "-shared", *objects.values(), "-o", target)
        loader = importlib.machinery.ExtensionFileLoader(_NAME, target.as_posix())
        spec = importlib.util.spec_from_loader(_NAME, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return cast("native.Accelerator", module)

    def _compile(self, source: Path, *warnings: str) -> Path:
        target = self._folder / f"{source.stem}.o"
        include = sysconfig.get_path("include")
        _run("cc", "-O1", "-std=c11", "-fPIC", *warnings, f"-I{include}", f"-I{SOURCES}", "-c", source, "-o", target)
        return target


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
