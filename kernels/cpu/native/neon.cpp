// NEON of 64-bit Arm: as avx2.cpp, in vectors of 4.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <utility>

#include "variant.h"

namespace quire {
namespace {

template <class L>
struct FloatReader;

struct Lanes {
    using Decoded = FloatReader<Lanes>;
    using Vector = float32x4_t;
    using Operand = float32x4_t;
    using Activation = float;
    using Tiles = NoTiles;
    static constexpr int kCount = 4, kHalves = 2, kRowsOfOne = 5, kRowsOfTwo = 2, kRowsOfFour = 0, kRowsDecoding = 10;

    static Vector set(float x) { return vdupq_n_f32(x); }
    static Vector load(const float *p) { return vld1q_f32(p); }
    static void store(float *p, Vector v) { vst1q_f32(p, v); }
    static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
    static Vector max(Vector a, Vector b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static Vector min(Vector a, Vector b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static Vector round(Vector v) { return vrndnq_f32(v); }
    static Vector scale(Vector v, Vector n) {
        return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
    }
    static Vector zero_below(Vector x, Vector limit, Vector value) {
        return vbslq_f32(vcltq_f32(x, limit), vdupq_n_f32(0.0f), value);
    }
    static Vector widen(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static void narrow(float *p, Vector v) { store(p, v); }
    // To nearest, ties to even; NaN becomes a quiet NaN.
    static void narrow_bf16(uint16_t *p, Vector v) {
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, quiet), 16));
    }
    static Operand weights(const uint16_t *p, int half) {
        const uint32x4_t pairs = vld1q_u32(reinterpret_cast<const uint32_t *>(p));
        return vreinterpretq_f32_u32(half ? vandq_u32(pairs, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(pairs, 16));
    }
    static Vector nibbles(const uint8_t *p, int high) {
        Vector v = {};
        for (int i = 0; i < kCount; ++i) v[i] = static_cast<float>(high ? p[i] >> 4 : p[i] & 15);
        return v;
    }
    static Vector signed_bytes(const int8_t *p) {
        int32_t four;
        __builtin_memcpy(&four, p, sizeof four);
        const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    }
    static Operand operand(Vector even, Vector odd, int half) { return half ? odd : even; }
    static void put_pair(float *p, int v, Vector even, Vector odd) {
        store(p + v * kCount, even);
        store(p + kLane + v * kCount, odd);
    }
    static Operand input(const float *p, int half) { return vdupq_n_f32(p[half]); }
    static Vector dot(Vector sum, Operand a, Operand b) { return vfmaq_f32(sum, a, b); }
};

#include "kernels.h"

}  // namespace

extern const Variant kNeon;
const Variant kNeon = variant_of<Lanes>("neon");

}  // namespace quire
#endif
