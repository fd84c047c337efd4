"""The emulated intrinsics do what the processor's manual says, and what a processor that has them does."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
import re

import numpy as np
import numpy.typing as npt
import pytest

from tests.native import emulation

pytestmark = pytest.mark.skipif(bool(emulation.obstacle()), reason=emulation.obstacle() or "AVX-512 can be emulated")
NAMES = re.findall(r"PROBE\((\w+)", emulation.INTRINSICS.read_text())[1:]
SMALLEST = 0x00800000  # the smallest normal float
NAN, LOUD_NAN, INFINITY, ONE = 0x7FC00000, 0x7F812345, 0x7F800000, 0x3F800000
Bits = npt.NDArray[np.uint32]


@pytest.fixture(scope="module", params=["emulated", "real"])
def instructions(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The emulation and, where it can be asked, the processor."""
    if request.param == "real" and not emulation.runs("avx512_bf16"):
        pytest.skip("this processor has no AVX-512 BF16 to hold the expected values against")
    return emulation.intrinsics(emulated=request.param == "emulated")


def call(instructions: ctypes.CDLL, name: str, *operands: npt.NDArray[np.generic]) -> Bits:
    """Returns the bits of a result, zeros after its last; operands are padded with zeros to 64 bytes."""
    memory = [np.zeros(64, np.uint8) for _ in range(4)]
    for padded, operand in zip(memory, operands, strict=False):
        padded[: operand.nbytes] = operand.view(np.uint8)
    getattr(instructions, name)(*(ctypes.c_void_p(part.ctypes.data) for part in memory))
    return memory[3].view(np.uint32)


def bits(*words: int) -> Bits:
    """Returns lanes of 32 bits."""
    return np.array(words, np.uint32)


def floats(*numbers: float) -> npt.NDArray[np.float32]:
    """Returns lanes of floats."""
    return np.array(numbers, np.float32)


def pairs(*lanes: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """Returns the even and the odd bfloat16 of each lane."""
    return np.array(lanes, np.uint16).ravel()


def is_nan(lanes: Bits) -> npt.NDArray[np.bool_]:
    """Returns which lanes hold floats that are not a number."""
    return (lanes & 0x7FFFFFFF) > INFINITY


ROUNDED = (
    (0x3F808000, 0x3F80),  # half way above an even number
    (0x3F818000, 0x3F82),  # half way above an odd one
    (0x3F808001, 0x3F81),
    (0x7F7FFFFF, 0x7F80),  # the largest float rounds to infinity
    (INFINITY, 0x7F80),
    (LOUD_NAN, 0x7FC1),  # cut off, and quiet
    (0xFF800001, 0xFFC0),  # its bits are all cut off: it must not become infinity
    (SMALLEST, 0x0080),
    (SMALLEST - 1, 0),  # denormals would round up to the smallest normal number
    (0x807FFFFF, 0x8000),  # a zero keeps the sign
)


def test_conversions_to_bf16_round_ties_to_even(instructions: ctypes.CDLL) -> None:
    """Activations and weights would be other numbers than the processor's."""
    found = call(instructions, "cvtneps_pbh", bits(*(word for word, _ in ROUNDED))).view(np.uint16)
    assert [hex(value) for value in found[: len(ROUNDED)]] == [hex(value) for _, value in ROUNDED]


def test_the_second_operand_is_the_lower_half(instructions: ctypes.CDLL) -> None:
    """Weights of even and of odd inputs would change places."""
    found = call(instructions, "cvtne2ps_pbh", floats(*[1.0] * 16), floats(*[2.0] * 16)).view(np.uint16)
    assert found.tolist() == [0x4000] * 16 + [0x3F80] * 16


@pytest.mark.parametrize(
    ("total", "a", "b", "expected"),
    [
        (0x40400000, (0x4000, 0x4040), (0x4080, 0x40A0), 0x41D00000),  # 3 + 2 * 4 + 3 * 5 = 26
        # 2 ** 24 + 1 is a tie and stays; the 1.5 of the even pair then goes up to 2. The other order: 2 + 1, 4.
        (0x4B800000, (0x3FC0, 0x3F80), (0x3F80, 0x3F80), 0x4B800001),
        # The odd product cancels the sum; the even one is then exact.
        (0x4B800000, (0x3F80, 0xCB80), (0x3F80, 0x3F80), ONE),
        # Rounded once: 1.0078125 ** 2 = 1 + 2 ** -6 + 2 ** -14, whose last bit is kept beside -1 - 2 ** -6.
        (0xBF820000, (0, 0x3F81), (0, 0x3F81), 0x38800000),
        # Operands that are denormal are zeros: bfloat16 times 2 ** 127, and the sum.
        (0, (0x007F, 0x007F), (0x7F00, 0x7F00), 0),
        (SMALLEST - 1, (0, 0), (0, 0), 0),
        (0x807FFFFF, (0x8000, 0x8000), (0x3F80, 0x3F80), 0x80000000),
        # Results that are denormal are zeros, between the two products too: 2 ** -127, to which another is added.
        (0, (0, 0x0080), (0, 0x3F00), 0),
        (0, (0x0080, 0x0080), (0x3F00, 0x3F00), 0),
        (0, (0x8080, 0), (0x3F00, 0), 0x80000000),
        (0, (0, 0x0080), (0, 0x3F80), SMALLEST),
        # Which are denormal shows when they are rounded as if there were no smallest number: 2 ** -126 less 1/2, 3/4
        # of 2 ** -150.
        (SMALLEST, (0x9A00, 0), (0x1980, 0), SMALLEST),
        (SMALLEST, (0x9A40, 0), (0x1980, 0), 0),
        (SMALLEST, (0, 0x9A40), (0, 0x1980), 0),
        # NaN becomes quiet, wherever it stands.
        (LOUD_NAN, (0, 0), (0, 0), LOUD_NAN | 0x400000),
        (0, (0x7F81, 0), (0, 0), 0x7FC10000),
        (0, (0, 0x7F81), (0, 0), 0x7FC10000),
        (0, (0, 0), (0x7F81, 0), 0x7FC10000),
        (0, (0, 0), (0, 0x7F81), 0x7FC10000),
        # Infinity times zero, and times a denormal number, which is one.
        (0, (0x7F80, 0), (0, 0), 0xFFC00000),
        (0, (0, 0x7F80), (0, 0x007F), 0xFFC00000),
    ],
)
def test_products_of_bf16_pairs(
    instructions: ctypes.CDLL, total: int, a: tuple[int, int], b: tuple[int, int], expected: int
) -> None:
    """The order of the two products, their roundings and their denormals decide about bits of every logit."""
    found = call(instructions, "dpbf16_ps", bits(*[total] * 16), pairs(*[a] * 16), pairs(*[b] * 16))
    assert {hex(value) for value in found} == {hex(expected)}


def test_an_index_wraps(instructions: ctypes.CDLL) -> None:
    """Four bits are decoded by an index that has the other four bits above it."""
    numbers = np.arange(16, dtype=np.float32)
    index = bits(0, 15, 16, 17, 0xF3, 0xFFFFFFFF, *[0x85] * 10)
    found = call(instructions, "permutexvar_ps", index, numbers).view(np.float32)
    assert found.tolist() == [0, 15, 0, 1, 3, 15, *[5] * 10]
    words, order = np.arange(100, 132, dtype=np.uint16), np.array([31, 32, 33, 0xFFFF] * 8, np.uint16)
    assert call(instructions, "permutexvar_epi16", order, words).view(np.uint16).tolist() == [131, 100, 101, 131] * 8


def test_comparisons_with_nan(instructions: ctypes.CDLL) -> None:
    """Not-a-number must go through a softmax, not become a zero there."""
    a, b = floats(1, 2, 2, np.nan, 1, np.nan), floats(2, 1, 2, 1, np.nan, np.nan)
    assert call(instructions, "cmp_nlt", a, b)[0] == 0b1111111111111110
    assert call(instructions, "cmp_unord", a, b)[0] == 0b111000


def test_maxima_are_the_second_operand_where_there_is_none(instructions: ctypes.CDLL) -> None:
    """Whether not-a-number is seen in a maximum depends on the side on which it stands."""
    a, b = floats(np.nan, 1, 0.0, -0.0, 3), floats(1, np.nan, -0.0, 0.0, 2)
    assert call(instructions, "max_ps", a, b)[:5].tolist() == [ONE, NAN, 0x80000000, 0, 0x40400000]
    assert call(instructions, "min_ps", a, b)[:5].tolist() == [ONE, NAN, 0x80000000, 0, 0x40000000]


def test_floats_become_the_nearest_integers(instructions: ctypes.CDLL) -> None:
    """An exponential takes its power of two from here, also of what is out of range."""
    numbers = floats(0.5, 1.5, -2.5, 2.4, 2.0**31, -(2.0**31), np.nan, -np.inf)
    found = call(instructions, "cvtps_epi32", numbers).view(np.int32)
    assert found[:8].tolist() == [0, 2, -2, 2, *[-(2**31)] * 4]
    found = call(instructions, "roundscale_ps", numbers)
    assert found[:4].view(np.float32).tolist() == [0, 2, -2, 2]
    assert found[6] == NAN


def test_integers_are_widened_narrowed_and_shifted(instructions: ctypes.CDLL) -> None:
    """Signs of 8-bit weights would be lost, or high bits would spill into neighbours."""
    small = np.array([0, 127, 128, 255] * 4, np.uint8)
    assert call(instructions, "cvtepi8_epi32", small).view(np.int32)[:4].tolist() == [0, 127, -128, -1]
    assert call(instructions, "cvtepu8_epi32", small)[:4].tolist() == [0, 127, 128, 255]
    assert call(instructions, "cvtepu16_epi32", np.array([0xFFFF] * 16, np.uint16)).tolist() == [0xFFFF] * 16
    assert call(instructions, "cvtepi32_epi16", bits(0x12345, 0xFFFF8000)).view(np.uint16)[:2].tolist() == [
        0x2345,
        0x8000,
    ]
    assert call(instructions, "srli_epi32", bits(0x80000010))[0] == 0x08000001
    assert call(instructions, "slli_epi32", bits(0x103))[0] == 0x81800000
    assert not call(instructions, "slli_epi32_by_32", bits(*[0xFFFFFFFF] * 16)).any()
    assert call(instructions, "cvtepi32_ps", bits(0x01000001, 0x01000003)).view(np.float32)[:2].tolist() == [
        2**24,
        2**24 + 4,
    ]


def test_masks_and_constants_are_in_the_order_of_lanes(instructions: ctypes.CDLL) -> None:
    """Every lane would get another's value."""
    lanes, mask = np.arange(1, 17, dtype=np.uint32), np.array([0b1000000000000101], np.uint16)
    assert call(instructions, "maskz_mov_ps", mask, lanes).tolist() == [1, 0, 3, *[0] * 12, 16]
    assert call(instructions, "mask_mov_epi32", 100 + lanes, mask, lanes).tolist() == [1, 102, 3, *range(104, 116), 16]
    assert call(instructions, "setr_ps").view(np.float32).tolist() == list(range(16))
    assert call(instructions, "set_epi16").view(np.uint16).tolist() == list(range(32))


@pytest.mark.skipif(not emulation.runs("avx512_bf16"), reason="this processor has no AVX-512 BF16 to compare with")
def test_the_processor_gives_the_same_bits() -> None:
    """The manual may be read wrongly, and the processor may do what it does not say."""
    real, emulated = emulation.intrinsics(emulated=False), emulation.intrinsics(emulated=True)
    random = np.random.default_rng(1)
    special = bits(0, 1 << 31, ONE, NAN, LOUD_NAN, INFINITY, SMALLEST, SMALLEST - 1, 0x3F808000, 0x3F818000, 0x00800080)
    for turn, name in itertools.product(range(900), NAMES):
        # Any bits; then floats near one, whose sums cancel; then what is special.
        any_bits = random.integers(0, 1 << 32, (3, 16), np.uint32)
        near = random.standard_normal((3, 16)).astype(np.float32).view(np.uint32)
        operands = (any_bits, near, random.choice(special, (3, 16)))[turn % 3]
        expected, found = (call(side, name, *operands) for side in (real, emulated))
        # Which of several NaN becomes the result depends on the order in which a compiler has put the operands.
        open_to_both = is_nan(expected) & is_nan(found) if name in {"fmadd_ps", "dpbf16_ps"} else False
        assert ((expected == found) | open_to_both).all(), (name, operands)


def test_an_intrinsic_that_is_not_emulated_does_not_compile(tmp_path: Path) -> None:
    """A test would end with an illegal instruction, in whatever test comes first."""
    source = tmp_path / "missing.cpp"
    source.write_text(
        "#include <immintrin.h>\nnamespace quire { __m512 next(__m512 a) { return _mm512_rcp14_ps(a); } }\n"
    )
    with pytest.raises(RuntimeError, match="_mm512_rcp14_ps"):
        emulation.build(tmp_path / "missing.so", [source])
    source.write_text(
        "#include <immintrin.h>\n"
        "namespace quire { __mmask16 next(__m512 a) { return _mm512_cmp_ps_mask(a, a, _CMP_LT_OQ); } }\n"
    )
    with pytest.raises(RuntimeError, match="does not know this operand"):
        emulation.build(tmp_path / "missing.so", [source])
