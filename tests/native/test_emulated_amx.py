"""The emulated tiles do what the processor's manual says, and what a processor that has them does."""

from __future__ import annotations

import ctypes
import itertools
import signal
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

from tests.native import emulation

pytestmark = pytest.mark.skipif(bool(emulation.obstacle()), reason=emulation.obstacle() or "AMX can be emulated")
STRIDE = 80
"""Bytes from row to row; a row has at most 64."""
NAN, LOUD_NAN, INFINITY, SMALLEST = 0x7FC00000, 0x7F812345, 0x7F800000, 0x00800000
ZERO, ONE, BIG, MINUS_BIG = 0, 0x3F80, 0x4B80, 0xCB80  # bfloat16; 2 ** 24
Bits = npt.NDArray[np.uint32]
Halves = npt.NDArray[np.uint16]
Products = list[tuple[int, int]]


@pytest.fixture(scope="module", params=["emulated", "real"])
def tiles(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The emulation and, where it can be asked, the processor."""
    if request.param == "real" and not emulation.runs("amx_bf16"):
        pytest.skip("this processor has no AMX to hold the expected values against")
    return emulation.tiles(emulated=request.param == "emulated")


def address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    """Returns where an array lies."""
    return ctypes.c_void_p(array.ctypes.data)


def multiply(tiles: ctypes.CDLL, sums: Bits, activations: Halves, weights: Halves) -> Bits:
    """Returns what is added to sums [2, 2, row, 16] by activations [2, row, 2 * depth] and weights [2, depth, 32]."""
    rows, depth = sums.shape[2], weights.shape[1]
    spread = np.full((4, rows, STRIDE), 0xAB, np.uint8)
    spread[..., :64] = sums.reshape(4, rows, 16).view(np.uint8)
    spread_in = np.full((2, rows, STRIDE), 0xFF, np.uint8)
    spread_in[..., : 4 * depth] = activations.view(np.uint8)
    weights = np.ascontiguousarray(weights)
    tiles.multiply(rows, depth, ctypes.c_ssize_t(STRIDE), address(spread), address(spread_in), address(weights))
    assert (spread[..., 64:] == 0xAB).all(), "wrote past the end of a row"
    return np.ascontiguousarray(spread[..., :64]).view(np.uint32).reshape(sums.shape)


def bf16(numbers: npt.ArrayLike) -> Halves:
    """Returns numbers that bfloat16 holds, or cuts off what it does not hold."""
    return (np.asarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_row_meets_every_weight(tiles: ctypes.CDLL, rows: int, depth: int) -> None:
    """Rows, outputs, or even and odd inputs would change places, or one tile would be taken for another."""
    random = np.random.default_rng(rows)
    sums = random.integers(-100, 100, (2, 2, rows, 16)).astype(np.float32)
    activations = random.integers(-100, 100, (2, rows, 2 * depth))
    weights = random.integers(-100, 100, (2, depth, 16, 2))
    expected = sums + np.einsum("trkp,wkop->twro", activations.reshape(2, rows, depth, 2), weights)
    found = multiply(tiles, sums.view(np.uint32), bf16(activations), bf16(weights).reshape(2, depth, 32))
    assert (found.view(np.float32) == expected).all()


@pytest.mark.parametrize(
    ("total", "even", "odd", "expected"),
    [
        # Even and odd ones are added up apart: each of two times 1 is lost beside 2 ** 24, which then cancels.
        (0x40400000, [(BIG, ONE), (ONE, ONE), (ONE, ONE)], [(MINUS_BIG, ONE)], 0x40400000),
        # In order: two times 1 come first here.
        (0, [(ONE, ONE), (ONE, ONE), (BIG, ONE)], [(MINUS_BIG, ONE)], 0x40000000),
        # Their sums come together, 2 ** 24 + 1 is a tie and stays, before they meet what there was, -2 ** 24.
        (0xCB800000, [(BIG, ONE)], [(ONE, ONE)], 0),
        # Rounded once: 1.0078125 ** 2 = 1 + 2 ** -6 + 2 ** -14, whose last bit is kept beside -1 - 2 ** -6.
        (0, [(0xBF82, ONE), (0x3F81, 0x3F81)], [], 0x38800000),
        (0, [], [(0xBF82, ONE), (0x3F81, 0x3F81)], 0x38800000),
        # Operands that are denormal are zeros: bfloat16 times 2 ** 127, and what there was.
        (0, [(0x007F, 0x7F00), (0x7F00, 0x007F)], [(0x007F, 0x7F00)], 0),
        (SMALLEST - 1, [], [], 0),
        (0x807FFFFF, [], [], 0),
        # Results that are denormal are zeros: of a product, 2 ** -127, of both sums, and with what there was.
        (0, [(0x0080, 0x3F00), (0x0080, 0x3F00)], [(0x0080, 0x3F00)], 0),
        (0, [(0x00C0, ONE)], [(0x8080, ONE)], 0),
        (0x00C00000, [(0x8080, ONE)], [], 0),
        (0x80C00000, [(0x0080, ONE)], [], 0x80000000),
        (0, [(0x0080, ONE)], [], SMALLEST),
        # Which are denormal shows when they are rounded as if there were no smallest number: 2 ** -126 less 1/2, 3/4
        # of 2 ** -150.
        (0, [(0x2000, 0x2000), (0x9A00, 0x1980)], [], SMALLEST),
        (0, [(0x2000, 0x2000), (0x9A40, 0x1980)], [], 0),
        (0, [], [(0x2000, 0x2000), (0x9A40, 0x1980)], 0),
        # Sums begin with a zero that is not negative.
        (0x80000000, [(0x8000, ONE)] * 8, [(0x8000, ONE)] * 8, 0),
        # NaN becomes quiet, wherever it stands.
        (LOUD_NAN, [], [], LOUD_NAN | 0x400000),
        (0, [(0x7F81, ZERO)], [], 0x7FC10000),
        (0, [(ZERO, 0x7F81)], [], 0x7FC10000),
        (0, [], [(0x7F81, ZERO)], 0x7FC10000),
        (0, [], [(ZERO, ZERO), (ZERO, 0x7F81)], 0x7FC10000),
        # Infinity times zero, times a denormal number, which is one, and less infinity.
        (0, [(0x7F80, ZERO)], [], 0xFFC00000),
        (0, [], [(0x7F80, 0x007F)], 0xFFC00000),
        (0, [(0x7F80, ONE)], [(0xFF80, ONE)], 0xFFC00000),
        (0xFF800000, [(0x7F80, ONE)], [], 0xFFC00000),
        (0, [(0x7F00, 0x4000)], [], INFINITY),
    ],
)
def test_products_of_bf16_pairs(tiles: ctypes.CDLL, total: int, even: Products, odd: Products, expected: int) -> None:
    """The order of the products, their roundings and their denormals decide about bits of every logit."""
    operands = np.zeros((2, 8, 2), np.uint16)  # [activation or weight, pair, even or odd]
    for place, products in enumerate((even, odd)):
        operands[:, : len(products), place] = np.array(products, np.uint16).reshape(-1, 2).T
    sums = np.full((2, 2, 16, 16), total, np.uint32)
    activations = np.broadcast_to(operands[0].reshape(16), (2, 16, 16))
    weights = np.broadcast_to(operands[1][:, None], (2, 8, 16, 2)).reshape(2, 8, 32)
    assert {hex(value) for value in multiply(tiles, sums, activations, weights).ravel()} == {hex(expected)}


def test_a_new_shape_forgets_what_tiles_held(tiles: ctypes.CDLL) -> None:
    """Sums of another product would be added to the next one's."""
    full, reshaped, zeroed = (np.full((16, 16), value, np.float32) for value in (1, 2, 3))
    tiles.forget(*map(address, (full, reshaped, zeroed)))
    assert not reshaped.any()
    assert not zeroed.any()


def test_tiles_without_a_shape_end_the_process(tiles: ctypes.CDLL) -> None:
    """The emulation would pass what is an illegal instruction where it is served."""
    # Listing the variants asks the system for tiles; then it is their shape alone that is missing.
    script = (
        "import ctypes, resource, sys\n"
        "from kernels.cpu import library\n"
        "library.load()\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "ctypes.CDLL(sys.argv[1]).misuse()\n"
    )
    command = [sys.executable, "-c", script, tiles._name]
    run = subprocess.run(command, cwd=emulation.ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) in {
        (-signal.SIGILL, ""),
        (-signal.SIGABRT, "emulated AMX: tiles are used that have no shape\n"),
    }


def some(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Bits:
    """Returns bits of floats."""
    if kind == "any":
        return random.integers(0, 1 << 32, shape, np.uint32)
    near = random.standard_normal(shape).astype(np.float32)
    if kind == "denormal":  # as their products are, or nearly
        near *= (2.0 ** random.integers(-75, -60, shape)).astype(np.float32)
    found = near.view(np.uint32)
    if kind == "special":
        special = np.array([0, 1 << 31, NAN, LOUD_NAN, INFINITY, SMALLEST, SMALLEST - 1, 0x7F7F0000], np.uint32)
        found = np.where(random.random(shape) < 0.02, random.choice(special, shape), found)
    return found


@pytest.mark.skipif(not emulation.runs("amx_bf16"), reason="this processor has no AMX to compare with")
@pytest.mark.parametrize("kind", ["any", "near one", "denormal", "special"])
def test_the_processor_gives_the_same_bits(kind: str) -> None:
    """The manual may be read wrongly, and the processor may do what it does not say."""
    random = np.random.default_rng(1)
    real, emulated = emulation.tiles(emulated=False), emulation.tiles(emulated=True)
    for rows, depth, _ in itertools.product(range(1, 17), (8, 16), range(30)):
        sums = some(random, kind, (2, 2, rows, 16))
        if kind == "denormal":
            sums = (sums.view(np.float32) * np.float32(2.0**-60)).view(np.uint32)
        activations, weights = (
            (some(random, kind, shape) >> 16).astype(np.uint16) for shape in ((2, rows, 2 * depth), (2, depth, 32))
        )
        expected, found = (multiply(side, sums, activations, weights) for side in (real, emulated))
        # Which of several NaN becomes the result depends on the order in which a compiler has put the operands.
        open_to_both = np.isnan(expected.view(np.float32)) & np.isnan(found.view(np.float32))
        assert ((expected == found) | open_to_both).all(), (rows, depth, sums, activations, weights)
