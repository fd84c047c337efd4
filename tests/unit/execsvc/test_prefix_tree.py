"""Which rows begin with the same blocks: the tree that is kept up against groups that are found anew each time."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from execsvc.gpu.step_groups import StepGroups
from execsvc.prefix_tree import GroupRules, PrefixTree
from kernels.paged_attention.group_columns import GroupColumns, with_shared_blocks

ROWS, BLOCKS, BLOCK_SIZE = 12, 9, 4
Path = tuple[int, ...]


def groups_anew(paths: dict[int, Path], rules: GroupRules) -> dict[int, tuple[Path, set[int]]]:
    """Returns for each row in a group what its rows share, and who they are: every pair of rows is compared."""

    def shared(first: Path, second: Path) -> Path:
        length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        return first[: min(len(first), len(second)) if length is None else length]

    prefixes = {shared(paths[a], paths[b]) for a in paths for b in paths if a != b} - {()}
    found: dict[int, tuple[Path, set[int]]] = {}
    for prefix in sorted(prefixes, key=len, reverse=True):
        parent = max((len(p) for p in prefixes if len(p) < len(prefix) and prefix[: len(p)] == p), default=0)
        rest = {row for row, path in paths.items() if path[: len(prefix)] == prefix and row not in found}
        if rules.pays(len(rest), len(prefix) * BLOCK_SIZE, parent * BLOCK_SIZE):
            found |= dict.fromkeys(rest, (prefix, rest))
    return found


class Tables:
    """Random tables that fork from one another, grow, and have entries replaced; and the tree that hears of it."""

    def __init__(self, seed: int, rules: GroupRules) -> None:
        self.random = random.Random(seed)
        self.tables = np.zeros((ROWS, BLOCKS), dtype=np.int32)
        self.tree = PrefixTree(self.tables, BLOCK_SIZE, rules)
        self.paths: dict[int, Path] = {}
        self.next_block = 1

    def block(self) -> int:
        """Returns a block that nobody has."""
        self.next_block += 1
        return self.next_block

    def write(self, row: int, start: int, blocks: Path) -> None:
        """Writes entries of a row and tells the tree."""
        self.tables[row, start : start + len(blocks)] = blocks
        path = self.paths.get(row, ())
        self.paths[row] = path[:start] + blocks + path[start + len(blocks) :]
        self.tree.table_written(row, start, start + len(blocks))

    def change(self) -> None:
        """Does one thing that a plan may do."""
        draw = self.random
        kind = draw.random()
        free = [row for row in range(ROWS) if row not in self.paths]
        if free and (kind < 0.35 or not self.paths):
            path: Path = ()
            if self.paths and draw.random() < 0.8:
                path = draw.choice(list(self.paths.values()))
                path = path[: draw.randint(len(path) // 2, len(path))]
            new = tuple(self.block() for _ in range(draw.randint(0, BLOCKS - len(path))))
            self.write(draw.choice(free), 0, path + new[: draw.choice([0, 1, 9])])
            return
        row = draw.choice(list(self.paths))
        path = self.paths[row]
        if kind < 0.42:
            del self.paths[row]
            self.tree.row_dropped(row)
        elif kind < 0.75 and len(path) < BLOCKS:
            self.write(row, len(path), (self.block(),))
        elif path:
            # Another row's block in the same place, as when equal blocks are merged, or one of its own.
            index = draw.randrange(len(path))
            others = [other[index] for other in self.paths.values() if len(other) > index]
            self.write(row, index, (draw.choice([*others, self.block()]),))

    def found(self) -> dict[int, tuple[Path, set[int]]]:
        """Returns what the tree says, in the form of `groups_anew`."""
        members: dict[int, set[int]] = {}
        for row, group in enumerate(self.tree.row_groups.tolist()):
            if group >= 0:
                members.setdefault(group, set()).add(row)
        found = {}
        for group, rows in members.items():
            length = int(self.tree.shared_tokens[group]) // BLOCK_SIZE
            prefixes = {self.paths[row][:length] for row in rows}
            assert len(prefixes) == 1, "rows of a group differ in what they share"
            found |= dict.fromkeys(rows, (prefixes.pop(), rows))
        return found


RULES = [GroupRules(2, 1, 1), GroupRules(3, 13, 1), GroupRules(16, 20, 1)]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_groups_that_are_kept_up_are_those_found_anew(rules: GroupRules, seed: int) -> None:
    """A row in a wrong group would attend to another one's text; a row in none would read what it need not."""
    tables = Tables(seed, rules)
    grouped = 0
    for _ in range(400):
        tables.change()
        expected = groups_anew(tables.paths, rules)
        assert tables.found() == expected
        grouped += len(expected)
    assert grouped > 300, "hardly anything was shared: the test tests nothing"


def test_the_version_changes_with_every_group() -> None:
    """Steps look at the groups again only then."""
    tables = Tables(3, RULES[0])
    before: tuple[int, object] = (tables.tree.version, tables.found())
    for _ in range(400):
        tables.change()
        after = (tables.tree.version, tables.found())
        assert (after[0] != before[0]) or after[1] == before[1]
        before = after


@pytest.mark.parametrize("seed", range(4))
def test_columns_on_the_device_are_the_groups_of_the_step(seed: int) -> None:
    """Deltas must leave the device with exactly the groups of this step, whatever the last one was composed of."""
    rules = GroupRules(3, 7, 16)
    tables, draw = Tables(seed, rules), random.Random(seed)
    columns = GroupColumns.allocate(ROWS // 2, ROWS, torch.device("cpu"))
    groups = StepGroups(tables.tree, columns, BLOCK_SIZE)
    paid = 0
    for _ in range(300):
        if draw.random() < 0.7:
            tables.change()
        rows = draw.sample(sorted(tables.paths), draw.randint(0, len(tables.paths)))
        computed = [len(tables.paths[row]) * BLOCK_SIZE - draw.choice([0, 0, 1, 7]) for row in rows]
        pays = groups.select(np.array(rows, dtype=np.int64), np.array(computed, dtype=np.int64).clip(0))
        expected = _expected_step(tables, rules, rows, computed)
        assert pays == (sum(saved for saved, _, _ in expected) >= rules.step_tokens)
        if not pays:
            continue
        paid += 1
        offsets, values = groups.take_writes()
        columns.state[torch.from_numpy(offsets)] = torch.from_numpy(values)
        assert _groups_of(columns) == sorted((shared, members) for _, shared, members in expected)
        staged = torch.from_numpy(tables.tables[rows])
        replaced = with_shared_blocks(columns, staged, BLOCK_SIZE)
        assert torch.equal(replaced, staged), "the first member's blocks are everybody's"
    assert paid > 30


def _expected_step(
    tables: Tables, rules: GroupRules, rows: list[int], computed: list[int]
) -> list[tuple[int, int, list[int]]]:
    """Returns (saved tokens, shared tokens, places) of a step's groups."""
    found = []
    for prefix, members in {id(entry[1]): entry for entry in groups_anew(tables.paths, rules).values()}.values():
        places = [place for place, row in enumerate(rows) if row in members]
        if not places:
            continue
        least = min(max(computed[place], 0) for place in places) // BLOCK_SIZE * BLOCK_SIZE
        tokens = min(len(prefix) * BLOCK_SIZE, least)
        saved = rules.saved(len(places), tokens)
        if saved >= rules.group_tokens:
            found.append((saved, tokens, places))
    return found


def _groups_of(columns: GroupColumns) -> list[tuple[int, list[int]]]:
    """Returns (shared tokens, places) of the groups that columns describe."""
    starts = columns.starts.tolist()
    found = []
    for group, (first, end) in enumerate(itertools.pairwise(starts)):
        if end > first:
            found.append((int(columns.shared[group]), sorted(columns.members[first:end].tolist())))
    return sorted(found)


def test_with_too_many_groups_those_that_save_most_remain() -> None:
    """The device has room for so many only."""
    tables = np.arange(1, 1 + 8 * 6, dtype=np.int32).reshape(8, 6)
    for pair in range(4):
        tables[2 * pair + 1, : pair + 2] = tables[2 * pair, : pair + 2]
    tree = PrefixTree(tables, BLOCK_SIZE, GroupRules(4, 1, 1))
    for row in range(8):
        tree.table_written(row, 0, 6)
    columns = GroupColumns.allocate(2, 8, torch.device("cpu"))
    groups = StepGroups(tree, columns, BLOCK_SIZE)
    assert groups.select(np.arange(8), np.full(8, 24))
    offsets, values = groups.take_writes()
    columns.state[torch.from_numpy(offsets)] = torch.from_numpy(values)
    assert _groups_of(columns) == [(16, [4, 5]), (20, [6, 7])]
