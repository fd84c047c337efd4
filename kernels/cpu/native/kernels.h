// All kernels of a variant, in the order in which they build on each other. A variant's file defines its `Lanes`,
// includes this inside an anonymous namespace, and puts the functions into a table.
//
// Nothing here may call an inline function of the standard library: the linker keeps one copy of such a function, perhaps
// the one that was compiled for an instruction set that this processor does not have.
constexpr int kHeadLimit = 512;   // largest head_dim
constexpr int kGroupLimit = 256;  // most query heads of a key/value head, or rows that attend together

#include "rows.h"
#include "formats.h"
#include "cache.h"
#include "tiles.h"
#include "panels.h"
#include "attention.h"

template <class L>
constexpr Variant variant_of(const char *name) {
    return {name,
            sizeof(typename L::Activation),
            L::Tiles::kQueryRows,
            L::Tiles::kProductRows,
            L::Tiles::kProductBytes,
            &norm<L>,
            &embed<L>,
            &embed_panels<L>,
            &panel_bytes<L>,
            &product_scratch<L>,
            &product<L>,
            &rotate<L>,
            &AttentionScratch<L>::bytes,
            &attend<L>,
            &merge<L>,
            &best<L>};
}
