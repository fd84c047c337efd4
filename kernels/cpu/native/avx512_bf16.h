// What variants share that multiply bf16. Included inside their anonymous namespaces, after avx512.h.
struct Avx512Bf16 : Avx512 {
    using Operand = __m512bh;
    using Activation = uint16_t;
    static constexpr int kHalves = 1, kRowsOfOne = 10, kRowsOfTwo = 10, kRowsOfFour = 6, kRowsDecoding = 10;

    static void narrow(uint16_t *p, Vector v) { narrow_bf16(p, v); }
    static void narrow_bf16(uint16_t *p, Vector v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
    static Operand weights(const uint16_t *p, int) { return (__m512bh)_mm512_loadu_si512(p); }
    // Weights are rounded to bf16 here, so that they are those of the same model stored in bf16.
    static Operand operand(Vector even, Vector odd, int) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // 16 of even, then 16 of odd
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (__m512bh)_mm512_permutexvar_epi16(order, halves);
    }
    static void put_pair(uint16_t *p, int, Vector even, Vector odd) {
        _mm512_storeu_si512(p, (__m512i)operand(even, odd, 0));
    }
    static Operand input(const uint16_t *p, int) {
        int pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Vector dot(Vector sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
};
