"""Which tests prove which row of docs/behaviour.md.

A test proves a row by its name (`test_row_07_...`, `test_rows_07_and_08_...`, `test_rows_19_26_and_73_...`) or by the
marker `@pytest.mark.row(7)`, an invariant by `@pytest.mark.invariant(3)`, on itself or on its class.
`python -m tests.conformance.rows` writes the names of the tests
into the document.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
import re

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "behaviour.md"
ROW_COUNT = 80
INVARIANT_COUNT = 14

_IN_NAME = re.compile(r"^test_rows?_(\d\d(?:_(?:and_)?\d\d)*)(?:_|$)")
_LINE = re.compile(r"^\| (?P<key>I?\d+) \| (?P<text>[^|]+) \| (?P<tests>[^|]*) \|$")


def rows_in_name(name: str) -> list[int]:
    """Returns the rows that the name of a test claims."""
    found = _IN_NAME.match(name)
    return [int(number) for number in re.findall(r"\d\d", found[1])] if found else []


def _marked(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, marker: str) -> list[int]:
    """Returns the numbers in the decorators `@pytest.mark.<marker>(...)` of a test or a class."""
    numbers: list[int] = []
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{marker}":
            numbers += [int(ast.literal_eval(argument)) for argument in decorator.args]
    return numbers


def _tests(path: Path) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """Yields (node id, name, rows marked, invariants marked) of every test in a file."""
    name = path.relative_to(ROOT).as_posix()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, functions) and node.name.startswith("test_"):
            yield f"{name}::{node.name}", node.name, _marked(node, "row"), _marked(node, "invariant")
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            rows, invariants = _marked(node, "row"), _marked(node, "invariant")
            if rows or invariants:
                yield f"{name}::{node.name}", node.name, rows, invariants
            for inner in node.body:
                if isinstance(inner, functions) and inner.name.startswith("test_"):
                    node_id = f"{name}::{node.name}::{inner.name}"
                    yield node_id, inner.name, _marked(inner, "row"), _marked(inner, "invariant")


def proofs() -> dict[str, list[str]]:
    """Returns the node ids of the tests of every row ("7") and invariant ("I3"), in the order of the files."""
    found: dict[str, list[str]] = {str(row): [] for row in range(1, ROW_COUNT + 1)}
    found |= {f"I{number}": [] for number in range(1, INVARIANT_COUNT + 1)}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node_id, name, rows, invariants in _tests(path):
            keys = [str(row) for row in dict.fromkeys([*rows_in_name(name), *rows])]
            for key in [*keys, *(f"I{number}" for number in invariants)]:
                found.setdefault(key, []).append(node_id)
    return found


def documented() -> dict[str, tuple[str, list[str]]]:
    """Returns what docs/behaviour.md says: the behaviour and the tests of each row and invariant."""
    entries = {}
    for line in DOCUMENT.read_text().splitlines():
        found = _LINE.match(line)
        if found:
            entries[found["key"]] = (found["text"].strip(), re.findall(r"`([^`]+)`", found["tests"]))
    return entries


def write() -> None:
    """Writes the names of the tests into docs/behaviour.md."""
    known = proofs()
    lines = []
    for line in DOCUMENT.read_text().splitlines():
        found = _LINE.match(line)
        if found:
            names = "<br>".join(f"`{short(node_id)}`" for node_id in known[found["key"]]) or "none yet"
            line = f"| {found['key']} | {found['text'].strip()} | {names} |"  # noqa: PLW2901 - the line as it shall be
        lines.append(line)
    DOCUMENT.write_text("\n".join(lines) + "\n")


def short(node_id: str) -> str:
    """Returns a node id as the document has it: without the folder "tests"."""
    return node_id.removeprefix("tests/")


if __name__ == "__main__":
    write()
