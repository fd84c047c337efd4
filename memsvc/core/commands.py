"""Which methods of the core are commands, and how an accepted one comes into the command log.

A command is a method that may change the state. Its arguments are all that the change depends on, time included, so
that the commands in their order are the state; see `memsvc.core.log`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from quire.errors import QuireError

P = ParamSpec("P")
R = TypeVar("R")


class Recorder(Protocol):
    """Takes down accepted commands."""

    def append(self, command: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, refused: bool) -> None:
        """Takes down a command; `refused`: it raised, but changed something that a replay must change too."""
        ...


class Recorded(Protocol):
    """What has commands: the log is None while nobody wants them, and while a command runs."""

    log: Recorder | None


C = TypeVar("C", bound=Recorded)


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A declared command.

    Attributes:
        name: name of the method.
        parameters: names of its arguments, in order, without `self`.
        is_light: whether they are a few numbers and names, which take no memory worth counting.
    """

    name: str
    parameters: tuple[str, ...]
    is_light: bool

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns one argument of a call, or None if it was not given."""
        if name in kwargs:
            return kwargs[name]
        at = self.parameters.index(name) if name in self.parameters else len(args)
        return args[at] if at < len(args) else None


_LIGHT = frozenset({"int", "float", "str", "bool"})

COMMANDS: dict[str, Command] = {}
"""Every command by its name."""


def command(
    *, leaves_traces: type[QuireError] | tuple[()] = ()
) -> Callable[[Callable[Concatenate[C, P], R]], Callable[Concatenate[C, P], R]]:
    """Declares a method a command.

    Args:
        leaves_traces: the refusal after which the state may differ all the same, for example by a recall; such a call
            is taken down too. All other refusals change nothing.
    """

    def declare(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
        name = method.__name__
        parameters = list(inspect.signature(method).parameters.values())[1:]
        is_light = all(parameter.annotation in _LIGHT for parameter in parameters)
        COMMANDS[name] = Command(name, tuple(parameter.name for parameter in parameters), is_light)

        @functools.wraps(method)
        def run(core: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
            log = core.log
            if log is None:
                return method(core, *args, **kwargs)
            # What a command calls belongs to it: without the log it is not taken down twice.
            core.log = None
            try:
                result = method(core, *args, **kwargs)
            except leaves_traces:
                core.log = log
                log.append(name, args, kwargs, refused=True)
                raise
            except BaseException:
                core.log = log
                raise
            core.log = log
            log.append(name, args, kwargs, refused=False)
            return result

        return run

    return declare
