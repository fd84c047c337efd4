// AVX-512 with BF16: activations are bf16 as well, and one instruction multiplies pairs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "variant.h"

namespace quire {
namespace {

#include "avx512.h"
#include "avx512_bf16.h"

template <class L>
struct Bf16Reader;

struct Lanes : Avx512Bf16 {
    using Decoded = Bf16Reader<Lanes>;
    using Tiles = NoTiles;
};

#include "kernels.h"

}  // namespace

extern const Variant kAvx512Bf16;
const Variant kAvx512Bf16 = variant_of<Lanes>("avx512_bf16");

}  // namespace quire
#endif
