// The intrinsics one by one, for comparisons: built on the emulation, and for processors that have the instructions.
#include <immintrin.h>

namespace quire {
namespace {

template <class V>
V read(const void *from) {
    V vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class V>
void write(void *to, V vector) {
    __builtin_memcpy(to, &vector, sizeof vector);
}

__m512 floats(const void *from) { return read<__m512>(from); }
__m512i integers(const void *from) { return read<__m512i>(from); }
__m512bh narrow(const void *from) { return read<__m512bh>(from); }

// Takes up to three vectors of 64 bytes and writes what `result` is.
#define PROBE(name, result)                                                                              \
    extern "C" __attribute__((visibility("default"))) void name(const void *a, const void *b, const void *c, \
                                                                void *out) {                             \
        (void)a, (void)b, (void)c;                                                                       \
        write(out, result);                                                                              \
    }

PROBE(setr_ps, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
PROBE(set_epi16, _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11,
                                  10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))
PROBE(fmadd_ps, _mm512_fmadd_ps(floats(a), floats(b), floats(c)))
PROBE(max_ps, _mm512_max_ps(floats(a), floats(b)))
PROBE(min_ps, _mm512_min_ps(floats(a), floats(b)))
PROBE(roundscale_ps, _mm512_roundscale_ps(floats(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
PROBE(cmp_nlt, _mm512_cmp_ps_mask(floats(a), floats(b), _CMP_NLT_UQ))
PROBE(cmp_unord, _mm512_cmp_ps_mask(floats(a), floats(b), _CMP_UNORD_Q))
PROBE(and_si512, _mm512_and_si512(integers(a), integers(b)))
PROBE(or_si512, _mm512_or_si512(integers(a), integers(b)))
PROBE(add_epi32, _mm512_add_epi32(integers(a), integers(b)))
PROBE(slli_epi32, _mm512_slli_epi32(integers(a), 23))
PROBE(srli_epi32, _mm512_srli_epi32(integers(a), 4))
PROBE(slli_epi32_by_32, _mm512_slli_epi32(integers(a), 32))
PROBE(maskz_mov_ps, _mm512_maskz_mov_ps(read<__mmask16>(a), floats(b)))
PROBE(mask_mov_epi32, _mm512_mask_mov_epi32(integers(a), read<__mmask16>(b), integers(c)))
PROBE(permutexvar_ps, _mm512_permutexvar_ps(integers(a), floats(b)))
PROBE(permutexvar_epi16, _mm512_permutexvar_epi16(integers(a), integers(b)))
PROBE(cvtps_epi32, _mm512_cvtps_epi32(floats(a)))
PROBE(cvtepi32_ps, _mm512_cvtepi32_ps(integers(a)))
PROBE(cvtepi8_epi32, _mm512_cvtepi8_epi32(read<__m128i>(a)))
PROBE(cvtepu8_epi32, _mm512_cvtepu8_epi32(read<__m128i>(a)))
PROBE(cvtepu16_epi32, _mm512_cvtepu16_epi32(read<__m256i>(a)))
PROBE(cvtepi32_epi16, _mm512_cvtepi32_epi16(integers(a)))
PROBE(cvtneps_pbh, _mm512_cvtneps_pbh(floats(a)))
PROBE(cvtne2ps_pbh, _mm512_cvtne2ps_pbh(floats(a), floats(b)))
PROBE(dpbf16_ps, _mm512_dpbf16_ps(floats(a), narrow(b), narrow(c)))

}  // namespace
}  // namespace quire
