"""Which open sequences begin with the same blocks, kept up by what changes in their tables.

Tables are paths of a radix tree. A row is a leaf where its table parts from all others; a node is a run of blocks that
several tables have in the same place. What is behind a leaf belongs to its row alone and is read from the live table,
so a table that grows changes nothing here.

Each node says whether it is a group: the rows below it, without those of groups further down, share its blocks and are
attended to together. A row is in one group, the deepest above it. With m rows to a node of t tokens, M members that one
program takes, and s the tokens of the node's parent:

    saved(m, t) = (m - ceil(m / M)) t             tokens that need not be read
    group:        saved(m, t) >= group_tokens  and  M saved(m, t) > m (M - 1) s

The second condition asks whether they had better be counted among the parent's rows, where each saves (M - 1) / M of s.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

_NONE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class GroupRules:
    """When it pays to read a prefix once for several sequences."""

    members_per_item: int
    """Sequences whose queries one program computes together; at least 2."""
    group_tokens: int
    """Tokens that a group must save at least."""
    step_tokens: int
    """Tokens that all groups of a step must save at least."""

    def saved(self, members: int, tokens: int) -> int:
        """Returns how many tokens a group of `members` that share `tokens` need not read."""
        return (members + -members // self.members_per_item) * tokens

    def pays(self, members: int, tokens: int, parent_tokens: int) -> bool:
        """Whether they should be a group of their own."""
        saved, most = self.saved(members, tokens), self.members_per_item
        return saved >= self.group_tokens and most * saved > members * (most - 1) * parent_tokens


class _Node:
    """Blocks that all tables below have in the same place."""

    __slots__ = ("children", "edge", "ends", "group", "parent", "reported", "rest", "start")

    def __init__(self, parent: _Node | None, start: int, edge: Words) -> None:
        self.parent = parent
        self.start = start
        """Where in a table the node's own blocks begin."""
        self.edge = edge
        """The node's own blocks."""
        self.children: dict[int, _Node | int] = {}
        """Nodes and rows by the next block."""
        self.ends: set[int] = set()
        """Rows whose tables end here."""
        self.rest = 0
        """Rows below that are in no group further down."""
        self.reported = 0
        """Rows that the parent counts for this node."""
        self.group = _NONE

    @property
    def depth(self) -> int:
        """Blocks that all tables below have in common."""
        return self.start + len(self.edge)

    @property
    def key(self) -> int:
        """The first of its own blocks."""
        return int(self.edge[0])


class PrefixTree:
    """Groups of rows. One thread calls.

    Args:
        tables: `[row, block_max]`, the live block tables.
        block_size: tokens of a block.
        rules: when rows are a group.
    """

    def __init__(self, tables: Words, block_size: int, rules: GroupRules) -> None:
        row_count = len(tables)
        self.rules = rules
        self.row_groups: Ints = np.full(row_count, _NONE, dtype=np.int64)
        """`[row]`: number of its group; -1 for none."""
        self.shared_tokens: Ints = np.zeros(row_count, dtype=np.int64)
        """`[group]`: tokens that its rows share."""
        self.version = 0
        """Changes whenever a group does."""
        self._tables = tables
        self._block_size = block_size
        self._counts = [0] * row_count
        self._root = _Node(None, 0, tables[0, :0])
        self._parents: list[_Node | None] = [None] * row_count
        self._starts = [0] * row_count
        self._keys = [_NONE] * row_count
        """First block of each leaf; -1 for a row whose table ends at its parent."""
        self._free_groups = list(range(row_count - 1, -1, -1))

    def table_written(self, row: int, start: int, stop: int) -> None:
        """Takes note that entries `start` .. `stop` - 1 of an open row's table have changed."""
        self._counts[row] = max(self._counts[row], stop)
        if self._parents[row] is not None:
            if start > self._starts[row]:
                return
            self._remove(row)
        self._insert(row)

    def row_dropped(self, row: int) -> None:
        """Takes note that a row is closed, if it was open."""
        if self._parents[row] is not None:
            self._remove(row)
        self._counts[row] = 0

    def _tail(self, row: int, depth: int) -> Words:
        """Returns the blocks of a row's table from `depth` on."""
        return self._tables[row, depth : self._counts[row]]

    def _insert(self, row: int) -> None:
        """Puts a row where its table leads."""
        node, depth = self._root, 0
        while depth < self._counts[row]:
            child = node.children.get(int(self._tables[row, depth]))
            if child is None:
                break
            if isinstance(child, int):
                length = _common_length(self._tail(row, depth), self._tail(child, depth))
                node = self._split_leaf(node, child, depth, length)
            else:
                length = _common_length(self._tail(row, depth), child.edge)
                node = child if length == len(child.edge) else self._split_node(child, length)
            depth += length
        self._attach(row, node)
        self._assign_row(row, self._group_above(node))
        node.rest += 1
        self._settle(node)

    def _remove(self, row: int) -> None:
        """Takes a row out; its parent goes too if only one path is left through it."""
        node = self._parents[row]
        assert node is not None, "the row is in the tree"
        self._detach(row, node)
        self._assign_row(row, _NONE)
        node.rest -= 1
        if node.parent is None or len(node.children) + len(node.ends) > 1:
            self._settle(node)
            return
        self._dissolve(node, node.parent)

    def _dissolve(self, node: _Node, parent: _Node) -> None:
        """Takes out a node that one path is left through."""
        if node.group != _NONE:
            self._set_group(node, grouped=False)
        left = node.ends.pop() if node.ends else next(iter(node.children.values()))
        if isinstance(left, int):
            del parent.children[node.key]
            self._attach(left, parent, node.start)
            parent.rest += 1 - node.reported
        else:
            left.start, left.edge = node.start, np.concatenate([node.edge, left.edge])
            left.parent, parent.children[node.key] = parent, left
            parent.rest += left.reported - node.reported
            self._settle(left)
        self._settle(parent)

    def _split_leaf(self, parent: _Node, row: int, depth: int, length: int) -> _Node:
        """Returns a new node for the first `length` blocks of a leaf below `parent`."""
        node = _Node(parent, depth, self._tables[row, depth : depth + length].copy())
        self._detach(row, parent)
        parent.children[node.key] = node
        self._attach(row, node)
        # The parent counted the row, and counts it for the new node now.
        node.rest = node.reported = 1
        return node

    def _split_node(self, child: _Node, length: int) -> _Node:
        """Returns a new node for the first `length` blocks of `child`."""
        parent = child.parent
        assert parent is not None, "the root has no blocks"
        node = _Node(parent, child.start, child.edge[:length])
        parent.children[node.key] = node
        child.parent, child.start, child.edge = node, child.start + length, child.edge[length:]
        node.children[child.key] = child
        node.rest = node.reported = child.reported
        self._settle(child)
        return node

    def _attach(self, row: int, node: _Node, start: int = _NONE) -> None:
        """Makes a row a leaf of `node`, from block `start` on; by default where the node's blocks end."""
        start = node.depth if start == _NONE else start
        self._parents[row], self._starts[row] = node, start
        if start < self._counts[row]:
            self._keys[row] = int(self._tables[row, start])
            node.children[self._keys[row]] = row
        else:
            self._keys[row] = _NONE
            node.ends.add(row)

    def _detach(self, row: int, node: _Node) -> None:
        """Undoes `_attach`."""
        if self._keys[row] == _NONE:
            node.ends.remove(row)
        else:
            del node.children[self._keys[row]]
        self._parents[row] = None

    def _settle(self, node: _Node) -> None:
        """Decides anew about a node and those above it whose rows change by that."""
        while node.parent is not None:
            size, parent = self._block_size, node.parent
            grouped = self.rules.pays(node.rest, node.depth * size, parent.depth * size)
            if grouped != (node.group != _NONE):
                self._set_group(node, grouped=grouped)
            counted = 0 if grouped else node.rest
            if counted == node.reported:
                return
            parent.rest += counted - node.reported
            node.reported = counted
            node = parent

    def _set_group(self, node: _Node, *, grouped: bool) -> None:
        """Makes a node a group or no longer one."""
        if grouped:
            node.group = self._free_groups.pop()
            self.shared_tokens[node.group] = node.depth * self._block_size
        else:
            self._free_groups.append(node.group)
            node.group = _NONE
        group = self._group_above(node)
        for row in self._rest_rows(node):
            self._assign_row(row, group)

    def _assign_row(self, row: int, group: int) -> None:
        """Puts a row into a group."""
        if self.row_groups[row] != group:
            self.row_groups[row] = group
            self.version += 1

    def _group_above(self, node: _Node) -> int:
        """Returns the group of rows that hang on `node`."""
        while node.group == _NONE and node.parent is not None:
            node = node.parent
        return node.group

    def _rest_rows(self, node: _Node) -> Iterator[int]:
        """Yields the rows below a node that are in no group further down."""
        stack = [node]
        while stack:
            current = stack.pop()
            yield from current.ends
            for child in current.children.values():
                if isinstance(child, int):
                    yield child
                elif child.group == _NONE:
                    stack.append(child)


def _common_length(first: Words, second: Words) -> int:
    """Returns how many blocks two runs have in common from their beginning."""
    length = min(len(first), len(second))
    differing = first[:length] != second[:length]
    place = int(differing.argmax()) if length else 0
    return place if length and differing[place] else length
