"""Mutants: one rule taken out of one function, by its text.

The text must be in the function exactly once: a mutant whose text is gone fails loudly, so that whoever changes the
function decides anew what its rule is.
"""

from __future__ import annotations
import __future__

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import inspect
import textwrap
from typing import Any


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A function with one of its rules removed.

    Attributes:
        name: what goes wrong, in a few words.
        target: "module:function" or "module:Class.method".
        old: text in its source, once.
        new: what stands there instead.
        killer: name of the scenario that must fail.
        protocol_rule: which of the six rules of the protocol is removed, 0 for none.
    """

    name: str
    target: str
    old: str
    new: str
    killer: str
    protocol_rule: int = 0


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Has the program run with `mutant` in place of its original.

    Raises:
        LookupError: the text is not in the function exactly once.
    """
    module_name, _, path = mutant.target.partition(":")
    module = importlib.import_module(module_name)
    owner: Any = module
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(_function(original)))
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.target} has {source.count(mutant.old)} times {mutant.old!r}")
    flags = __future__.annotations.compiler_flag
    code = compile(source.replace(mutant.old, mutant.new), f"<{mutant.name}>", "exec", flags, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(code, vars(module), made)
    setattr(owner, name, made[name])
    try:
        yield
    finally:
        setattr(owner, name, original)


def _function(found: Any) -> Any:
    """Returns the function behind a property, a static method or a function."""
    if isinstance(found, property):
        return found.fget
    return found.__func__ if isinstance(found, staticmethod) else found
