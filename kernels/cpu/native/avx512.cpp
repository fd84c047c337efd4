// AVX-512 without bf16 products: as avx2.cpp, in vectors of 16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "variant.h"

namespace quire {
namespace {

#include "avx512.h"

template <class L>
struct FloatReader;

struct Lanes : Avx512 {
    using Decoded = FloatReader<Lanes>;
    using Operand = __m512;
    using Activation = float;
    using Tiles = NoTiles;
    static constexpr int kHalves = 2, kRowsOfOne = 8, kRowsOfTwo = 8, kRowsOfFour = 4, kRowsDecoding = 8;

    static void narrow(float *p, Vector v) { store(p, v); }
    static Operand weights(const uint16_t *p, int half) {
        const __m512i pairs = _mm512_loadu_si512(p);
        return _mm512_castsi512_ps(half ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                        : _mm512_slli_epi32(pairs, 16));
    }
    static Operand operand(Vector even, Vector odd, int half) { return half ? odd : even; }
    static void put_pair(float *p, int, Vector even, Vector odd) {
        store(p, even);
        store(p + kLane, odd);
    }
    static Operand input(const float *p, int half) { return _mm512_set1_ps(p[half]); }
    static Vector dot(Vector sum, Operand a, Operand b) { return _mm512_fmadd_ps(a, b, sum); }
};

#include "kernels.h"

}  // namespace

extern const Variant kAvx512;
const Variant kAvx512 = variant_of<Lanes>("avx512");

}  // namespace quire
#endif
