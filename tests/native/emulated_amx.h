// The tiles of kernels/cpu/native/amx.h for processors without them: what uses them runs wherever there is AVX2.
//
// Semantics are those of Intel's Software Developer's Manual, volume 2. Where the processor would raise an exception,
// because tiles have no shape or there is no such shape, the process ends with a message. Tiles that do not fit each
// other do not compile.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../kernels/cpu/native/variant.h"
#include "emulated_avx512.h"

namespace quire {

struct Amx : SomeTiles {
    static void shape(int rows, int depth) {
        if (rows == rows_ && depth == depth_) return;
        if (rows < 1 || rows > kRows || depth < 1 || depth > 16) fail("there is no such shape of tiles");
        std::memset(tiles_, 0, sizeof tiles_);
        rows_ = rows, depth_ = depth;
    }

    static void release() { rows_ = depth_ = 0; }

    template <int Tile>
    static void zero() {
        need_shape();
        std::memset(tiles_[Tile], 0, sizeof tiles_[Tile]);
    }

    template <int Tile>
    static void load(const void *from, ptrdiff_t stride) {
        zero<Tile>();
        for (int row = 0; row < rows<Tile>(); ++row)
            std::memcpy(tiles_[Tile][row], static_cast<const char *>(from) + row * stride, row_bytes<Tile>());
    }

    template <int Tile>
    static void stream(const void *from, ptrdiff_t stride) {
        load<Tile>(from, stride);
    }

    template <int Tile>
    static void store(void *to, ptrdiff_t stride) {
        need_shape();
        for (int row = 0; row < rows<Tile>(); ++row)
            std::memcpy(static_cast<char *>(to) + row * stride, tiles_[Tile][row], row_bytes<Tile>());
    }

    template <int Sums, int Activations, int Weights>
    static void multiply() {
        static_assert(Sums < 6 && is_activations(Activations) && is_weights(Weights), "these tiles do not fit");
        need_shape();
        const unsigned before = _mm_getcsr();
        _mm_setcsr(kMxcsrOfBf16);
        add_products(tiles_[Sums], tiles_[Activations], tiles_[Weights], rows_, depth_);
        _mm_setcsr(before);
    }

   private:
    using Bytes = char[16][64];

    static constexpr bool is_activations(int tile) { return tile == 6; }
    static constexpr bool is_weights(int tile) { return tile == 7; }
    template <int Tile>
    static int rows() {
        return is_weights(Tile) ? depth_ : rows_;
    }
    template <int Tile>
    static size_t row_bytes() {
        return is_activations(Tile) ? 4 * static_cast<size_t>(depth_) : 64;
    }

    [[noreturn]] static void fail(const char *why) {
        std::fprintf(stderr, "emulated AMX: %s\n", why);
        std::abort();
    }
    static void need_shape() {
        if (rows_ == 0) fail("tiles are used that have no shape");
    }

    // The products of even elements and those of odd ones are added up apart, each rounded once; then both sums are
    // added, and that to what there was. Of several NaN, which one comes out is left open. This is called, never
    // inlined: the compiler does not know that it depends on MXCSR.
    __attribute__((noinline)) static void add_products(Bytes &sums, const Bytes &activations, const Bytes &weights,
                                                       int rows, int depth) {
        for (int row = 0; row < rows; ++row) {
            for (int half = 0; half < 64; half += 32) {
                __m256 even = _mm256_setzero_ps(), odd = even;
                for (int pair = 0; pair < depth; ++pair) {
                    int input;
                    __m256i weight;
                    std::memcpy(&input, &activations[row][4 * pair], sizeof input);
                    std::memcpy(&weight, &weights[pair][half], sizeof weight);
                    const __m256i inputs = _mm256_set1_epi32(input);
                    even = _mm256_fmadd_ps(even_floats(inputs), even_floats(weight), even);
                    odd = _mm256_fmadd_ps(odd_floats(inputs), odd_floats(weight), odd);
                }
                __m256 sum;
                std::memcpy(&sum, &sums[row][half], sizeof sum);
                sum = _mm256_add_ps(sum, _mm256_add_ps(even, odd));
                std::memcpy(&sums[row][half], &sum, sizeof sum);
            }
        }
    }

    static inline thread_local int rows_ = 0, depth_ = 0;  // zeros: no shape
    alignas(64) static inline thread_local Bytes tiles_[8];
};

}  // namespace quire
