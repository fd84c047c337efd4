// The AVX-512 intrinsics of kernels/cpu/native for processors without them: what uses them runs wherever there is AVX2.
//
// Semantics are those of Intel's Software Developer's Manual, volume 2, with MXCSR as a program finds it. Where AVX2 has
// the same instruction, each half takes it; the others are spelt out for one lane. The functions have the names of the
// compiler's and stand in namespace quire, where code of that namespace finds them first. It is compiled without AVX-512,
// so that an intrinsic which is missing here is found in the compiler's header and refused by its name ("target specific
// option mismatch"). To add one is to write what it does to a lane or to a half.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

// Compilers have some of them as macros.
#undef _mm512_cmp_ps_mask
#undef _mm512_roundscale_ps
#undef _mm512_setr_ps
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32

// A vector type as a template's argument is the plain vector, which is all that is meant here.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace quire {

#define EMULATED static inline __attribute__((always_inline))

void operand_not_emulated() __attribute__((error("emulated_avx512.h does not know this operand")));

// A vector in pieces, the lowest first: numbers, or the halves that AVX2 computes with.
template <class T, class V>
struct Pieces {
    static constexpr size_t kCount = sizeof(V) / sizeof(T);
    T at[kCount];

    explicit Pieces(const V &vector) { std::memcpy(at, &vector, sizeof vector); }
    V vector() const {
        V joined;
        std::memcpy(&joined, at, sizeof joined);
        return joined;
    }
};

template <class V, class F, class R, class... T, class... From>
EMULATED V each_as(const F &f, R (F::*)(T...) const, const From &...from) {
    Pieces<R, V> out{V{}};
    [&](const Pieces<T, From> &...in) __attribute__((always_inline)) {
        for (size_t i = 0; i < out.kCount; ++i) out.at[i] = f(in.at[i]...);
    }(Pieces<T, From>(from)...);
    return out.vector();
}

// The vector of what `f` returns for each piece. The types that it takes and returns say what a piece is.
template <class V, class F, class... From>
EMULATED V each(const F &f, const From &...from) {
    return each_as<V>(f, &F::operator(), from...);
}

// Memory, constants, and the same bits under another type.
EMULATED __m512 _mm512_loadu_ps(const void *p) {
    __m512 read;
    std::memcpy(&read, p, sizeof read);
    return read;
}
EMULATED __m512i _mm512_loadu_si512(const void *p) {
    __m512i read;
    std::memcpy(&read, p, sizeof read);
    return read;
}
EMULATED void _mm512_storeu_ps(void *p, __m512 a) { std::memcpy(p, &a, sizeof a); }
EMULATED void _mm512_storeu_si512(void *p, __m512i a) { std::memcpy(p, &a, sizeof a); }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
EMULATED __m512 _mm512_set1_ps(float x) {
    return each<__m512>([x] { return x; });
}
EMULATED __m512i _mm512_set1_epi32(int x) {
    return each<__m512i>([x] { return x; });
}
template <class... Number>
EMULATED __m512 _mm512_setr_ps(Number... lowest_first) {
    static_assert(sizeof...(lowest_first) == 16, "16 lanes");
    return __m512{static_cast<float>(lowest_first)...};
}
template <class... Number>
EMULATED __m512i _mm512_set_epi16(Number... highest_first) {
    static_assert(sizeof...(highest_first) == 32, "32 lanes");
    const int16_t numbers[] = {static_cast<int16_t>(highest_first)...};
    const int16_t *next = numbers + 32;
    return each<__m512i>([&next] { return *--next; });
}

// Floats.
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return each<__m512>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return each<__m512>([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return each<__m512>([](__m256 x, __m256 y) { return _mm256_min_ps(x, y); }, a, b);
}
EMULATED __m512 _mm512_roundscale_ps(__m512 a, int how) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    if (how != kNearest) operand_not_emulated();
    return each<__m512>([](__m256 x) { return _mm256_round_ps(x, kNearest); }, a);
}
// Bit i of the mask is what is true of lane i.
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    const Pieces<__m256, __m512> x(a), y(b);
    unsigned mask = 0;
    for (int i = 0; i < 2; ++i) {
        if (predicate == _CMP_NLT_UQ)
            mask |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.at[i], y.at[i], _CMP_NLT_UQ))) << 8 * i;
        else if (predicate == _CMP_UNORD_Q)
            mask |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.at[i], y.at[i], _CMP_UNORD_Q))) << 8 * i;
        else
            operand_not_emulated();
    }
    return static_cast<__mmask16>(mask);
}

// Integers.
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return each<__m512i>([](__m256i x, __m256i y) { return _mm256_add_epi32(x, y); }, a, b);
}
EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
    return each<__m512i>([n](__m256i x) { return _mm256_sll_epi32(x, _mm_cvtsi32_si128(static_cast<int>(n))); }, a);
}
EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
    return each<__m512i>([n](__m256i x) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(static_cast<int>(n))); }, a);
}

// Choices: by a mask, and by an index of which only as many bits count as there are lanes to choose from.
EMULATED __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
    unsigned next = mask * 2u;
    return each<__m512>([&next](float x) { return (next >>= 1) & 1 ? x : 0.0f; }, a);
}
EMULATED __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i a) {
    unsigned next = mask * 2u;
    return each<__m512i>([&next](int x, int y) { return (next >>= 1) & 1 ? y : x; }, otherwise, a);
}
EMULATED __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    const Pieces<float, __m512> from(a);
    return each<__m512>([&from](uint32_t i) { return from.at[i & 15]; }, index);
}
EMULATED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    const Pieces<int16_t, __m512i> from(a);
    return each<__m512i>([&from](uint16_t i) { return from.at[i & 31]; }, index);
}

// Conversions of integers.
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {
    return each<__m512i>([](__m256 x) { return _mm256_cvtps_epi32(x); }, a);
}
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
    return each<__m512>([](__m256i x) { return _mm256_cvtepi32_ps(x); }, a);
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return each<__m512i>([](int8_t x) { return static_cast<int32_t>(x); }, a);
}
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return each<__m512i>([](uint8_t x) { return static_cast<uint32_t>(x); }, a);
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return each<__m512i>([](uint16_t x) { return static_cast<uint32_t>(x); }, a);
}
// Drops the high bits.
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
    return each<__m256i>([](uint32_t x) { return static_cast<uint16_t>(x); }, a);
}

// bfloat16, whose instructions never look at MXCSR: to nearest, ties to even; denormals are zeros, before and after.
EMULATED uint16_t bf16_of(uint32_t bits) {
    const uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // a quiet NaN
    if (size < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
    return each<__m256bh>([](uint32_t x) { return bf16_of(x); }, a);
}
// The lower half comes from the second operand.
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
    Pieces<__m256bh, __m512bh> halves{__m512bh{}};
    halves.at[0] = _mm512_cvtneps_pbh(b);
    halves.at[1] = _mm512_cvtneps_pbh(a);
    return halves.vector();
}
EMULATED __m256 odd_floats(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
EMULATED __m256 even_floats(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
// What MXCSR would say if their products looked at it. Which results are denormal the processor judges by how they
// would be rounded if there were no smallest number: what is rounded already does not tell.
constexpr unsigned kMxcsrOfBf16 = _MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON;
// The products of odd elements are added first and those of even ones to their sum, each with a rounding of its own.
// NaN becomes a quiet NaN; which of several it is is left open. All is one statement: the compiler does not know that
// the instructions depend on MXCSR.
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    Pieces<__m256, __m512> out(sum);
    const Pieces<__m256i, __m512bh> x(a), y(b);
    const unsigned before = _mm_getcsr();
    asm("vldmxcsr %[bf16]\n\t"
        "vfmadd231ps %[odd_x0], %[odd_y0], %[low]\n\t"
        "vfmadd231ps %[odd_x1], %[odd_y1], %[high]\n\t"
        "vfmadd231ps %[even_x0], %[even_y0], %[low]\n\t"
        "vfmadd231ps %[even_x1], %[even_y1], %[high]\n\t"
        "vldmxcsr %[before]"
        : [low] "+&x"(out.at[0]), [high] "+&x"(out.at[1])
        : [odd_x0] "x"(odd_floats(x.at[0])), [odd_y0] "x"(odd_floats(y.at[0])), [odd_x1] "x"(odd_floats(x.at[1])),
          [odd_y1] "x"(odd_floats(y.at[1])), [even_x0] "x"(even_floats(x.at[0])), [even_y0] "x"(even_floats(y.at[0])),
          [even_x1] "x"(even_floats(x.at[1])), [even_y1] "x"(even_floats(y.at[1])), [bf16] "m"(kMxcsrOfBf16),
          [before] "m"(before));
    return out.vector();
}

#undef EMULATED
}  // namespace quire
