"""The code stays readable: short functions, modules with one purpose, names that say something."""

import ast
from collections.abc import Iterator
from pathlib import Path
import re

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("execsvc", "gateway", "kernels", "memsvc", "quire", "scripts", "examples", "tests")
LONGEST_FUNCTION = 70
LONGEST_MODULE = 500
LONGEST_CODE_BASE = 53_000
REFUSED_WORDS = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
SOURCES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not GENERATED.search(path.name) and "__pycache__" not in path.parts
)


def relative(path: Path) -> str:
    """Returns a path for messages."""
    return path.relative_to(ROOT).as_posix()


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yields every function and class of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the lines of a function without its signature and docstring: what has to be held in mind at once."""
    body = node.body
    if ast.get_docstring(node) is not None:
        body = body[1:]
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_functions_fit_on_a_screen() -> None:
    """Otherwise nobody can check a change to them by reading."""
    long = [
        f"{relative(path)}:{node.lineno} {node.name} has {body_lines(node)} lines"
        for path in SOURCES
        for node in definitions(path)
        if not isinstance(node, ast.ClassDef) and body_lines(node) > LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_modules_have_one_purpose() -> None:
    """Otherwise the next engineer cannot guess where a thing is."""
    long = {relative(path): count for path in SOURCES if (count := len(path.read_text().splitlines())) > LONGEST_MODULE}
    assert not long


def test_the_code_base_grows_by_decision() -> None:
    """Otherwise it grows by habit until nobody has read all of it."""
    total = sum(len(path.read_text().splitlines()) for path in SOURCES if path.parts[len(ROOT.parts)] != "tests")
    assert total <= LONGEST_CODE_BASE


def test_no_name_hides_a_missing_noun() -> None:
    """A module called utils collects what nobody finds again; a BaseThing says nothing about things."""
    modules = [relative(path) for path in SOURCES if REFUSED_WORDS & set(path.stem.lower().split("_"))]
    folders = [relative(path) for path in SOURCES if REFUSED_WORDS & {part.lower() for part in path.parent.parts}]
    classes = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in definitions(path)
        if isinstance(node, ast.ClassDef) and re.match(r"Base[A-Z]|.*(Manager|Helper|Utils?)$", node.name)
    ]
    assert not (modules or folders or classes)


@pytest.mark.parametrize("word", ["TODO", "FIXME", "XXX"])
def test_nothing_is_left_for_later(word: str) -> None:
    """What is not done belongs to a tracker, where somebody looks."""
    found = [
        f"{relative(path)}:{number}"
        for path in SOURCES
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"#.*\b{word}\b", line)
    ]
    assert not found


def test_every_public_name_is_documented() -> None:
    """A user who asks `help()` gets an answer, tests included: theirs says what would break."""
    silent = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in definitions(path)
        if not node.name.startswith("_") and ast.get_docstring(node) is None and not _nested_or_overriding(path, node)
    ]
    assert not silent, "\n".join(silent)


def _nested_or_overriding(path: Path, node: ast.AST) -> bool:
    """Whether a function is local to another, or takes its contract from a class above."""
    tree = ast.parse(path.read_text())
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [one for one in ast.walk(outer) if one is not outer]
            if any(getattr(one, "lineno", None) == node.lineno for one in inner):  # type: ignore[attr-defined]
                return True
    decorators = {getattr(one, "id", "") for one in getattr(node, "decorator_list", [])}
    return bool(decorators & {"override", "overload"})


def test_nothing_is_unpickled() -> None:
    """A model file that runs code when it is read would own the machine."""
    loaders = re.compile(
        r"\b(pickle|cPickle|dill|shelve|marshal)\b\s*\.\s*loads?\b|\btorch\.load\(|\byaml\.load\(|(?<!\.)\beval\("
    )
    found = [
        f"{relative(path)}:{number}"
        for path in SOURCES
        if "tests" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if loaders.search(line)
    ]
    assert not found
