// Tiles of Intel AMX (see tiles.h). Included inside a variant's anonymous namespace.
//
// Instructions are spelt out, because the numbers of tiles are parts of them, and the compiler's intrinsics want those as
// tokens.
struct Amx : SomeTiles {
    // Of all tiles, until `release`: `rows` of sums and activations, and weights of `depth` pairs of inputs.
    static void shape(int rows, int depth) {
        const int wanted = rows << 8 | depth;
        if (shape_ == wanted) return;
        alignas(64) uint8_t palette[64] = {1};  // the only palette that there is
        for (int tile = 0; tile < 8; ++tile) {
            const bool weights = tile == 7, activations = tile == 6;
            palette[16 + 2 * tile] = static_cast<uint8_t>(activations ? 4 * depth : 64);  // bytes of a row
            palette[48 + tile] = static_cast<uint8_t>(weights ? depth : rows);
        }
        asm volatile("ldtilecfg %0" ::"m"(palette));
        shape_ = wanted;
    }

    static void release() {
        asm volatile("tilerelease");
        shape_ = 0;
    }

    template <int Tile>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
    }

    // Rows lie `stride` bytes apart.
    template <int Tile>
    static void load(const void *from, ptrdiff_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(from), "r"(stride) : "memory");
    }

    // Past the first-level cache, for what is read once.
    template <int Tile>
    static void stream(const void *from, ptrdiff_t stride) {
        asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(from), "r"(stride) : "memory");
    }

    template <int Tile>
    static void store(void *to, ptrdiff_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(to), "r"(stride) : "memory");
    }

    template <int Sums, int Activations, int Weights>
    static void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Activations), "i"(Weights));
    }

   private:
    static thread_local int shape_;
};

thread_local int Amx::shape_ = 0;
