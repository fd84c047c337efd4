"""A memory checker and race detector for kernels that run in Triton's interpreter.

The interpreter runs the programs of a grid one after the other and follows any pointer, so a kernel that races or
reads past a tensor usually passes. `watched_launches()` records every address that every program touches and reports:

- an access outside the tensor whose pointer it was computed from: not only past its end, but also between the rows of
  a strided view (the values, read through the view of the keys);
- two programs that store to one address, and a program that loads what another stores: on a GPU the order is open;
- two lanes of one store with one address.

Such an access is reported and left out, so that a faulty kernel cannot crash the tests. Atomic operations are checked
for bounds only.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Words = np.ndarray

_CARRIERS = (
    "create_splat",
    "create_broadcast",
    "create_expand_dims",
    "create_reshape",
    "create_trans",
    "create_unsplat",
)
"""Operations that move pointers about without changing what they point into."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """The bytes of one tensor argument."""

    name: str
    start: int
    element_bytes: int
    axes: tuple[tuple[int, int], ...]
    """(stride, size) in elements, largest stride first, without axes that take no room."""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Extent:
        """Returns the extent of `tensor`."""
        pairs = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
        if any(size == 0 for _, size in pairs):
            return cls(name, tensor.data_ptr(), tensor.element_size(), ((1, 0),))
        axes = tuple(sorted(((stride, size) for stride, size in pairs if stride), reverse=True))
        return cls(name, tensor.data_ptr(), tensor.element_size(), axes)

    @property
    def end(self) -> int:
        """The first byte behind the tensor."""
        if any(size == 0 for _, size in self.axes):
            return self.start
        return self.start + (sum(stride * (size - 1) for stride, size in self.axes) + 1) * self.element_bytes

    def holds(self, addresses: Words, access_bytes: int) -> np.ndarray:
        """Tells for each address whether an access of `access_bytes` there touches only elements of the tensor."""
        signed = addresses.astype(np.int64)
        inside = (signed >= self.start) & (signed + access_bytes <= self.end)
        if access_bytes == self.element_bytes and inside.any() and self._nested:
            rest = np.where(inside, signed - self.start, 0)
            aligned = rest % self.element_bytes == 0
            rest = rest // self.element_bytes
            for stride, size in self.axes:
                rest = rest - np.minimum(rest // stride, size - 1) * stride
            inside &= aligned & (rest == 0)
        return inside

    @property
    def _nested(self) -> bool:
        """Whether each stride steps over everything that the smaller ones reach; else only the ends are checked."""
        reach = 0
        for stride, size in reversed(self.axes):
            if stride <= reach:
                return False
            reach += stride * (size - 1)
        return True


class LaunchWatch:
    """What was found so far."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        """One sentence for each fault, in the order of the launches."""
        self.launch_count = 0
        """Launches seen: a test that launches nothing proves nothing."""
        self.loaded: collections.Counter[str] = collections.Counter()
        """Elements that were loaded, by the name of the argument that their tensor was first given as."""
        self._kernel = ""
        self._extents: dict[int, list[Extent]] = {}
        self._loads: list[tuple[int, Words]] = []
        self._stores: list[tuple[int, Words]] = []

    def take(self) -> list[str]:
        """Returns the faults and forgets them: for a test that plants one."""
        found, self.faults = self.faults, []
        return found

    def begin(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        """Starts the record of a launch."""
        self.launch_count += 1
        self._kernel, self._loads, self._stores = kernel, [], []
        self._extents = {}
        for name, tensor in tensors.items():
            self._extents.setdefault(tensor.data_ptr(), []).append(Extent.of(name, tensor))

    def origin(self, pointer: Any) -> list[Extent] | None:
        """Returns the tensors that `pointer` may point into; None when that is unknown."""
        found: list[Extent] | None = pointer.attr.get("origin")
        if found is None and pointer.data.size == 1:
            found = self._extents.get(int(np.asarray(pointer.data).ravel()[0]))
        return found

    def allow(self, grid: tuple[int, ...], pointers: Any, mask: Any, kind: str) -> Any:
        """Records an access and returns the mask of the lanes that may really happen."""
        addresses = np.asarray(pointers.data, dtype=np.uint64)
        lanes = np.array(np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape))
        touched = addresses[lanes]
        extents = self.origin(pointers)
        if extents is None:
            extents = [extent for group in self._extents.values() for extent in group]
        access_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(touched.shape, dtype=bool)
        for extent in extents:
            inside |= extent.holds(touched, access_bytes)
        if not inside.all():
            first = int(touched[~inside][0])
            near = min(extents, key=lambda extent: min(abs(first - extent.start), abs(first - extent.end)))
            self._report(
                f"program {grid}: {kind} out of bounds in {int((~inside).sum())} lane(s) of {touched.size}, the first "
                f"at byte {first - near.start} of '{near.name}', which has {near.end - near.start}"
            )
            lanes[lanes] = inside
            touched = touched[inside]
        program = (grid[0] << 42) | (grid[1] << 21) | grid[2]
        if kind == "load":
            self.loaded[extents[0].name if extents else ""] += touched.size
            self._loads.append((program, touched))
        elif kind == "store":
            if np.unique(touched).size != touched.size:
                self._report(f"program {grid}: two lanes of one store have one address")
            self._stores.append((program, touched))
        return Handle(lanes, interpreter.tl.int1)

    def end(self) -> None:
        """Compares the programs of the launch."""
        store_programs, stored = _pairs(self._stores)
        if not stored.size:
            return
        shared = np.flatnonzero((stored[1:] == stored[:-1]) & (store_programs[1:] != store_programs[:-1]))
        if shared.size:
            first = shared[0]
            one, other = _grid(store_programs[first]), _grid(store_programs[first + 1])
            self._report(f"programs {one} and {other} store to one address ({shared.size} such addresses)")
        load_programs, loaded = _pairs(self._loads)
        if not loaded.size:
            return
        # What several programs store was reported above: one of its owners is enough here.
        at = np.minimum(np.searchsorted(stored, loaded), stored.size - 1)
        foreign = np.flatnonzero((stored[at] == loaded) & (store_programs[at] != load_programs))
        if foreign.size:
            reader, writer = _grid(load_programs[foreign[0]]), _grid(store_programs[at[foreign[0]]])
            self._report(f"program {reader} loads what program {writer} stores ({foreign.size} such addresses)")

    def _report(self, sentence: str) -> None:
        self.faults.append(f"{self._kernel}: {sentence}")


def _pairs(records: list[tuple[int, Words]]) -> tuple[Words, Words]:
    """Returns the distinct (program, address) pairs as two arrays, sorted by address."""
    if not records:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    programs = np.concatenate([np.full(addresses.size, program, np.int64) for program, addresses in records])
    addresses = np.concatenate([addresses for _, addresses in records])
    order = np.lexsort((programs, addresses))
    programs, addresses = programs[order], addresses[order]
    kept = np.ones(addresses.size, dtype=bool)
    kept[1:] = (addresses[1:] != addresses[:-1]) | (programs[1:] != programs[:-1])
    return programs[kept], addresses[kept]


def _grid(program: Any) -> tuple[int, int, int]:
    number = int(program)
    return number >> 42, (number >> 21) & 0x1FFFFF, number & 0x1FFFFF


def _tensors(executor: Any, args: Any, options: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns the kernel's name and its tensor arguments."""
    function = executor.fn
    known = inspect.getfullargspec(function)
    own = {name: value for name, value in options.items() if name in known.args or name in known.kwonlyargs}
    bound = inspect.getcallargs(function, *args, **own)
    found: dict[str, torch.Tensor] = {}
    for name, value in bound.items():
        tensor = getattr(value, "base", value)
        if isinstance(tensor, torch.Tensor):
            found[name] = tensor
    return function.__name__, found


@contextlib.contextmanager
def watched_launches() -> Iterator[LaunchWatch]:
    """Within, every interpreted launch is watched. Yields the record; the caller looks at its faults."""
    watch = LaunchWatch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    add, launch = builder.create_addptr, executor.__call__

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(self, pointers, watch.allow(self.grid_idx, pointers, mask, "load"), *rest, **options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, watch.allow(self.grid_idx, pointers, mask, "store"), *rest)

    def watched_atomic(stock: Any, mask_at: int | None) -> Any:
        def operation(self: Any, *operands: Any) -> Any:
            pointers = next(operand for operand in operands if isinstance(operand, Handle))
            mask = Handle(np.ones_like(pointers.data, dtype=bool), interpreter.tl.int1)
            mask = mask if mask_at is None else operands[mask_at]
            allowed = watch.allow(self.grid_idx, pointers, mask, "atomic operation")
            if mask_at is None:
                return stock(self, *operands)
            return stock(self, *operands[:mask_at], allowed, *operands[mask_at + 1 :])

        return operation

    def carried(stock: Any) -> Any:
        def operation(self: Any, *operands: Any) -> Any:
            result = stock(self, *operands)
            for operand in operands:
                if isinstance(operand, Handle) and operand.dtype.scalar.is_ptr():
                    result.attr["origin"] = watch.origin(operand)
            return result

        return operation

    def watched_launch(self: Any, *args: Any, **options: Any) -> Any:
        watch.begin(*_tensors(self, args, options))
        result = launch(self, *args, **options)
        watch.end()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_atomic_rmw", watched_atomic(builder.create_atomic_rmw, 3))
        patch.setattr(builder, "create_atomic_cas", watched_atomic(builder.create_atomic_cas, None))
        patch.setattr(builder, "create_addptr", carried(add))
        for name in _CARRIERS:
            if hasattr(builder, name):
                patch.setattr(builder, name, carried(getattr(builder, name)))
        patch.setattr(executor, "__call__", watched_launch)
        yield watch
