// AMX: as avx512_bf16.cpp, with products of bf16 in tiles. Built where the compiler's assembler knows the instructions.
#include "variant.h"

#if defined(__x86_64__) && !defined(QUIRE_NO_AMX)
#include <immintrin.h>

#include <utility>

namespace quire {
namespace {

#include "avx512.h"
#include "avx512_bf16.h"
#if !defined(QUIRE_EMULATED_AVX512)  // that build for tests brings its own: see tests/native
#include "amx.h"
#endif

template <class L>
struct Bf16Reader;

struct Lanes : Avx512Bf16 {
    using Decoded = Bf16Reader<Lanes>;
    using Tiles = Amx;
    // What is stored in few bits is always decoded first, so that all products are those of tiles.
    static constexpr int kRowsDecoding = 0;
};

#include "kernels.h"

const Variant kVariant = variant_of<Lanes>("amx_bf16");

}  // namespace

extern const Variant *const kAmxBf16;
const Variant *const kAmxBf16 = &kVariant;

}  // namespace quire
#elif defined(__x86_64__)
namespace quire {

extern const Variant *const kAmxBf16;
const Variant *const kAmxBf16 = nullptr;

}  // namespace quire
#endif
