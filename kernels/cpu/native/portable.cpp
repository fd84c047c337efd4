// No instruction set in particular: the compiler's vectors, for any processor. Twice: with activations in float, and with
// activations in bf16, which follows the data of avx512_bf16.cpp where there is no processor to run that.
#include <utility>

#include "variant.h"

namespace quire {
namespace {

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

struct Portable {
    using Vector = Floats;
    using Operand = Floats;
    static constexpr int kCount = 16, kHalves = 2, kRowsOfOne = 2, kRowsOfTwo = 2;

    static Vector set(float x) { return x - Floats{}; }
    static Vector load(const float *p) {
        Vector v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float *p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }
    static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
    static Vector max(Vector a, Vector b) { return a > b ? a : b; }
    static Vector min(Vector a, Vector b) { return a < b ? a : b; }
    static Vector round(Vector v) {
        const Vector magic = set(12582912.0f);  // 1.5 * 2^23: what is added loses its fraction, to nearest
        return (v + magic) - magic;
    }
    static Vector scale(Vector v, Vector n) { return (Floats)((Ints)v + (__builtin_convertvector(n, Ints) << 23)); }
    static Vector zero_below(Vector x, Vector limit, Vector value) { return x < limit ? Floats{} : value; }
    static Vector widen(const uint16_t *p) {
        Vector v;
        for (int i = 0; i < kCount; ++i) v[i] = widened(p[i]);
        return v;
    }
    // To nearest, ties to even; NaN becomes a quiet NaN.
    static void narrow_bf16(uint16_t *p, Vector v) {
        const Ints bits = (Ints)v;
        for (int i = 0; i < kCount; ++i) {
            const uint32_t one = static_cast<uint32_t>(bits[i]);
            p[i] = static_cast<uint16_t>((v[i] == v[i] ? one + 0x7fff + (one >> 16 & 1) : one | 0x400000) >> 16);
        }
    }
    static Operand weights(const uint16_t *p, int half) {
        Ints pairs;
        __builtin_memcpy(&pairs, p, sizeof pairs);
        return (Floats)(half ? pairs & static_cast<int32_t>(0xffff0000u) : pairs << 16);
    }
    static Vector dot(Vector sum, Operand a, Operand b) { return a * b + sum; }
    static float widened(uint16_t x) {
        const uint32_t bits = static_cast<uint32_t>(x) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
};

struct Lanes : Portable {
    using Activation = float;
    static void narrow(float *p, Vector v) { store(p, v); }
    static Operand input(const float *p, int half) { return set(p[half]); }
};

struct Bf16Lanes : Portable {
    using Activation = uint16_t;
    static void narrow(uint16_t *p, Vector v) { narrow_bf16(p, v); }
    static Operand input(const uint16_t *p, int half) { return set(widened(p[half])); }
};

#include "kernels.h"

}  // namespace

extern const Variant kPortable, kPortableBf16;
const Variant kPortable = variant_of<Lanes>("portable");
const Variant kPortableBf16 = variant_of<Bf16Lanes>("portable_bf16");

}  // namespace quire
