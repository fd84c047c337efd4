// AVX2 with FMA: activations are float, weights and cache are widened from bf16 in registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "variant.h"

namespace quire {
namespace {

template <class L>
struct FloatReader;

struct Lanes {
    using Decoded = FloatReader<Lanes>;
    using Vector = __m256;
    using Operand = __m256;
    using Activation = float;
    using Tiles = NoTiles;
    static constexpr int kCount = 8, kHalves = 2, kRowsOfOne = 5, kRowsOfTwo = 2, kRowsOfFour = 0, kRowsDecoding = 10;

    static Vector set(float x) { return _mm256_set1_ps(x); }
    static Vector load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, Vector v) { _mm256_storeu_ps(p, v); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
    static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
    static Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
    static Vector round(Vector v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vector scale(Vector v, Vector n) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
    }
    static Vector zero_below(Vector x, Vector limit, Vector value) {
        return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), value);
    }
    static Vector widen(const uint16_t *p) {
        const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
    }
    static void narrow(float *p, Vector v) { store(p, v); }
    // To nearest, ties to even; NaN becomes a quiet NaN.
    static void narrow_bf16(uint16_t *p, Vector v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, is_nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
    }
    static Operand weights(const uint16_t *p, int half) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm256_castsi256_ps(half ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))
                                        : _mm256_slli_epi32(pairs, 16));
    }
    static Vector nibbles(const uint8_t *p, int high) {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
        return _mm256_cvtepi32_ps(high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
    }
    static Vector signed_bytes(const int8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    static Operand operand(Vector even, Vector odd, int half) { return half ? odd : even; }
    static void put_pair(float *p, int v, Vector even, Vector odd) {
        store(p + v * kCount, even);
        store(p + kLane + v * kCount, odd);
    }
    static Operand input(const float *p, int half) { return _mm256_broadcast_ss(p + half); }
    // Spelt out, because compilers turn a sum into another operand's register and then run out of registers.
    static Vector dot(Vector sum, Operand a, Operand b) {
        asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
        return sum;
    }
};

#include "kernels.h"

}  // namespace

extern const Variant kAvx2;
const Variant kAvx2 = variant_of<Lanes>("avx2");

}  // namespace quire
#endif
