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
    using Tiles = NoTiles;
    static constexpr int kCount = 16, kHalves = 2, kRowsOfOne = 2, kRowsOfTwo = 2, kRowsOfFour = 0, kRowsDecoding = 1;

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
    static Vector nibbles(const uint8_t *p, int high) {
        Vector v;
        for (int i = 0; i < kCount; ++i) v[i] = static_cast<float>(high ? p[i] >> 4 : p[i] & 15);
        return v;
    }
    static Vector signed_bytes(const int8_t *p) {
        Vector v;
        for (int i = 0; i < kCount; ++i) v[i] = static_cast<float>(p[i]);
        return v;
    }
    static Vector dot(Vector sum, Operand a, Operand b) { return a * b + sum; }
    static float widened(uint16_t x) {
        const uint32_t bits = static_cast<uint32_t>(x) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
};

template <class L>
struct FloatReader;
template <class L>
struct Bf16Reader;

struct Lanes : Portable {
    using Decoded = FloatReader<Lanes>;
    using Activation = float;
    static void narrow(float *p, Vector v) { store(p, v); }
    static Operand operand(Vector even, Vector odd, int half) { return half ? odd : even; }
    static void put_pair(float *p, int, Vector even, Vector odd) {
        store(p, even);
        store(p + kLane, odd);
    }
    static Operand input(const float *p, int half) { return set(p[half]); }
};

struct Bf16Lanes : Portable {
    using Decoded = Bf16Reader<Bf16Lanes>;
    using Activation = uint16_t;
    static void narrow(uint16_t *p, Vector v) { narrow_bf16(p, v); }
    // Weights are rounded to bf16 here, so that they are those of the same model stored in bf16.
    static Operand operand(Vector even, Vector odd, int half) {
        uint16_t narrow[kCount];
        narrow_bf16(narrow, half ? odd : even);
        return widen(narrow);
    }
    static void put_pair(uint16_t *p, int, Vector even, Vector odd) {
        uint16_t narrow[2][kCount];
        narrow_bf16(narrow[0], even);
        narrow_bf16(narrow[1], odd);
        for (int i = 0; i < 2 * kCount; ++i) p[i] = narrow[i % 2][i / 2];
    }
    static Operand input(const uint16_t *p, int half) { return set(widened(p[half])); }
};

#include "kernels.h"

}  // namespace

extern const Variant kPortable, kPortableBf16;
const Variant kPortable = variant_of<Lanes>("portable");
const Variant kPortableBf16 = variant_of<Bf16Lanes>("portable_bf16");

}  // namespace quire
