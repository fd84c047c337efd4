// A product in tiles, for comparisons: built on the emulation, and on amx.h for processors that have AMX.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "../../kernels/cpu/native/variant.h"

namespace quire {
namespace {

#if !defined(QUIRE_EMULATED_AVX512)
#include "amx.h"
#endif

#define PROBE extern "C" __attribute__((visibility("default"))) void

// Adds the products of both tiles of activations and both of weights to the four tiles of sums: [2 * activations +
// weights][row][16]. The rows of each but the weights' lie `stride` bytes apart.
PROBE multiply(int rows, int depth, ptrdiff_t stride, char *sums, const char *activations, const char *weights) {
    const ptrdiff_t tile = rows * stride;
    Amx::shape(rows, depth);
    Amx::load<0>(sums, stride);
    Amx::load<1>(sums + tile, stride);
    Amx::load<2>(sums + 2 * tile, stride);
    Amx::load<3>(sums + 3 * tile, stride);
    Amx::load<6>(activations, stride);
    Amx::load<7>(weights, 64);
    Amx::multiply<0, 6, 7>();
    Amx::stream<7>(weights + 64 * depth, 64);
    Amx::multiply<1, 6, 7>();
    Amx::load<6>(activations + tile, stride);
    Amx::multiply<3, 6, 7>();
    Amx::stream<7>(weights, 64);
    Amx::multiply<2, 6, 7>();
    Amx::store<0>(sums, stride);
    Amx::store<1>(sums + tile, stride);
    Amx::store<2>(sums + 2 * tile, stride);
    Amx::store<3>(sums + 3 * tile, stride);
    Amx::release();
}

// Writes what a tile holds that was loaded before all tiles got another shape, then what it holds when it is zeroed.
PROBE forget(const char *from, char *reshaped, char *zeroed) {
    Amx::shape(16, 16);
    Amx::load<0>(from, 64);
    Amx::load<1>(from, 64);
    Amx::zero<1>();
    Amx::store<1>(zeroed, 64);
    Amx::shape(16, 8);
    Amx::store<0>(reshaped, 64);
    Amx::release();
}

// Multiplies tiles whose shape is given back.
PROBE misuse() {
    Amx::shape(16, 16);
    Amx::release();
    Amx::multiply<0, 6, 7>();
}

}  // namespace
}  // namespace quire
