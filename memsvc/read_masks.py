"""Read masks (AIP-157): answers with only the fields that were asked for.

A path leads from the answer through lists, "blocks.block_id"; what is below a path comes whole. The token of the next
page always comes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
import functools
from typing import Any, Final, TypeVar

from google.protobuf import descriptor
from google.protobuf.message import Message

from quire.errors import InvalidRequestError

_FIELD: Final = "read_mask"
_ALWAYS: Final = "next_page_token"
_PATHS_MAXIMUM: Final = 64
_SHOWN: Final = 64

Tree = dict[str, Any]
"""Fields by name, each with those asked for below it; none below means all."""

C = TypeVar("C")


def with_read_masks(service: descriptor.ServiceDescriptor) -> Callable[[type[C]], type[C]]:
    """Returns a decorator of servicers of `service`: methods whose requests have a `read_mask` heed it."""

    def decorate(servicer: type[C]) -> type[C]:
        for method in service.methods:
            if _FIELD in method.input_type.fields_by_name:
                setattr(servicer, method.name, _masked(getattr(servicer, method.name), method.output_type))
        return servicer

    return decorate


def _masked(
    method: Callable[..., Awaitable[Message]], answer: descriptor.Descriptor
) -> Callable[..., Awaitable[Message]]:
    @functools.wraps(method)
    async def call(servicer: Any, request: Any, context: Any) -> Message:
        tree = read_tree(request.read_mask.paths, answer)
        response = await method(servicer, request, context)
        if tree:
            _prune(response, tree)
        return response

    return call


def read_tree(paths: Iterable[str], answer: descriptor.Descriptor) -> Tree:
    """Returns the fields that paths name; empty for all.

    Raises:
        InvalidRequestError: a path leads to no field of `answer`, or there are too many.
    """
    paths = list(paths)
    if len(paths) > _PATHS_MAXIMUM:
        message = f"{_FIELD}: {len(paths)} paths, allowed are at most {_PATHS_MAXIMUM}"
        raise InvalidRequestError(message, field=_FIELD)
    tree: Tree = {}
    for path in paths:
        below: descriptor.Descriptor | None = answer
        at = tree
        whole = False
        for name in path.split("."):
            field = below.fields_by_name.get(name) if below is not None else None
            if field is None:
                known = ", ".join(sorted(below.fields_by_name)) if below is not None else "none: it has no fields"
                message = f"{_FIELD}: {path[:_SHOWN]!r}: there is no {name[:_SHOWN]!r}, allowed are {known}"
                raise InvalidRequestError(message, field=_FIELD)
            below = field.message_type
            # All below is asked for already: there is nothing to add.
            whole = whole or (name in at and not at[name])
            at = {} if whole else at.setdefault(name, {})
        # All below is asked for, also where only some was.
        at.clear()
    return tree


def _prune(message: Message, tree: Tree) -> None:
    """Clears what was not asked for."""
    for field, value in message.ListFields():
        if field.name not in tree:
            if field.name != _ALWAYS:
                message.ClearField(field.name)
        elif tree[field.name]:
            for item in value if field.is_repeated else (value,):
                _prune(item, tree[field.name])
