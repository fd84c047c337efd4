// Products in two-dimensional registers, where a processor has them. Included by each variant, before panels.h.
//
// A tile is up to 16 rows of 64 bytes. One instruction adds to a tile of sums the product of a tile of activations and a
// tile of weights:
//
//     sums [row][16 outputs] float += activations [row][32 inputs] bf16 x weights [16 pairs of inputs][16 outputs][2] bf16
//
// 16 rows of a panel (see panels.h) are a tile of weights as they lie, and rows of activations are one with the distance
// of two rows as stride. Values of the cache come in runs of 16 positions, 8 rows of a panel: their tiles have half the
// inputs. Tiles are named by numbers that the instructions contain:
//
//     0..5    sums: of up to three tiles of rows and two panels, or of one tile of rows and four panels
//     6       activations
//     7       weights
//
// Every row of sums is a function of its own activations and of where its inputs are cut into tiles. That is the same
// for any number of rows, so here, too, a result never depends on company. Which is why a variant that has tiles takes
// them for one row as well.

template <class L>
struct Bf16Reader;

template <class L, class Reader>
constexpr bool in_tiles = false;
template <class L>
constexpr bool in_tiles<L, Bf16Reader<L>> = (L::Tiles::kRows > 0);

// While a thread computes with tiles. They are given back at the end: the system saves them at every change of threads.
template <class L>
class TileUse {
   public:
    TileUse() {
        if constexpr (L::Tiles::kRows > 0) L::Tiles::release();
    }
    ~TileUse() {
        if constexpr (L::Tiles::kRows > 0) L::Tiles::release();
    }
};

// How many panels so many rows multiply at once, of those that there are.
template <class L>
constexpr int tile_panels(int row_count, int panel_count) {
    if (panel_count >= 4 && row_count <= L::Tiles::kRows) return 4;
    return panel_count >= 2 ? 2 : 1;
}

constexpr int kActivations = 6, kWeights = 7;

template <class T, int... Sums>
void zero_sums(std::integer_sequence<int, Sums...>) {
    (T::template zero<Sums>(), ...);
}

template <class T, int Panels, int... Sums>
void store_sums(float *const *out, ptrdiff_t stride, std::integer_sequence<int, Sums...>) {
    (T::template store<Sums>(out[Sums / Panels] + Sums % Panels * kLane, stride), ...);
}

// All products of some tiles of rows with a tile of each panel. Rows go to and fro: the last of a panel are the first of
// the next one and need not be loaded again. Weights that are needed once pass by the first-level cache.
template <class T, int RowTiles, int Panels, bool Once, int Step = 0>
void multiply_tiles(const uint16_t *const *rows, ptrdiff_t stride, const char *const *weights) {
    constexpr int kPanel = Step / RowTiles, kAt = Step % RowTiles, kRow = kPanel % 2 ? RowTiles - 1 - kAt : kAt;
    if constexpr (kAt == 0 && Once) T::template stream<kWeights>(weights[kPanel], 64);
    if constexpr (kAt == 0 && !Once) T::template load<kWeights>(weights[kPanel], 64);
    if constexpr (Step == 0 || kAt > 0) T::template load<kActivations>(rows[kRow], stride);
    T::template multiply<kRow * Panels + kPanel, kActivations, kWeights>();
    if constexpr (Step + 1 < RowTiles * Panels)
        multiply_tiles<T, RowTiles, Panels, Once, Step + 1>(rows, stride, weights);
}

// What a block of rows is multiplied with, as in multiply_rows of panels.h.
struct TileFactors {
    const void *const *panels;
    int segments, pairs, depth;  // `depth`: pairs of inputs of a tile
    ptrdiff_t row_stride, out_stride;  // bytes
    // What is asked for meanwhile: of every `depth` lines from `ahead_first` on `ahead_count`, perhaps none.
    const void *const *ahead;
    int ahead_first, ahead_count;
};

// Up to three tiles of rows, which begin at `rows`.
template <class T, int RowTiles, int Panels, bool Once>
void multiply_block(const TileFactors &job, const uint16_t **rows, float *const *out) {
    using Sums = std::make_integer_sequence<int, RowTiles * Panels>;
    zero_sums<T>(Sums{});
    for (int segment = 0; segment < job.segments; ++segment) {
        const char *weights[Panels], *ahead[Panels];
        for (int p = 0; p < Panels; ++p) {
            weights[p] = static_cast<const char *>(job.panels[segment * Panels + p]);
            ahead[p] = static_cast<const char *>(job.ahead[segment * Panels + p]) + job.ahead_first * 64;
        }
        for (int pair = 0; pair < job.pairs; pair += job.depth) {
            for (int p = 0; p < Panels; ++p)
                for (int i = 0; i < job.ahead_count; ++i) __builtin_prefetch(ahead[p] + i * 64, 0, 2);
            multiply_tiles<T, RowTiles, Panels, Once>(rows, job.row_stride, weights);
            for (int p = 0; p < Panels; ++p) weights[p] += job.depth * 64, ahead[p] += job.depth * 64;
            for (int r = 0; r < RowTiles; ++r) rows[r] += 2 * job.depth;
        }
    }
    store_sums<T, Panels>(out, job.out_stride, Sums{});
}

template <class T, int Panels, bool Once>
void multiply_block(int row_tiles, const TileFactors &job, const uint16_t **rows, float *const *out) {
    if (row_tiles == 1) return multiply_block<T, 1, Panels, Once>(job, rows, out);
    if constexpr (Panels <= 2) {
        if (row_tiles == 2) return multiply_block<T, 2, Panels, Once>(job, rows, out);
        return multiply_block<T, 3, Panels, Once>(job, rows, out);
    }
}

// As multiply_rows of panels.h, with `panel_count` from tile_panels.
template <class L>
void multiply_in_tiles(const void *const *panels, int panel_count, int segments, int pairs, const uint16_t *rows,
                       int row_stride, int row_count, float *out, int out_stride, const void *const *next) {
    using T = typename L::Tiles;
    const int depth = pairs % 16 ? 8 : 16;
    // Tiles of one height: where the rows do not divide evenly, the last one begins among those of the tile before it,
    // and computes some of them again.
    const int tiles = (row_count + T::kRows - 1) / T::kRows, height = (row_count + tiles - 1) / tiles;
    const int blocks = (tiles + 2) / 3, asked = next ? (depth + blocks - 1) / blocks : 0;
    T::shape(height, depth);
    TileFactors job{panels, segments, pairs, depth, row_stride * static_cast<ptrdiff_t>(sizeof(uint16_t)),
                    out_stride * static_cast<ptrdiff_t>(sizeof(float)), next ? next : panels, 0, asked};
    for (int block = 0, tile = 0; block < blocks; ++block) {
        const int count = (tiles - tile) / (blocks - block);
        const uint16_t *from[3];
        float *to[3];
        for (int r = 0; r < count; ++r, ++tile) {
            const ptrdiff_t first = tile + 1 < tiles ? tile * height : row_count - height;
            from[r] = rows + first * row_stride;
            to[r] = out + first * out_stride;
        }
        // Each block asks for a part.
        job.ahead_first = block * asked;
        job.ahead_count = asked < depth - job.ahead_first ? asked : depth - job.ahead_first;
        if (panel_count == 4)
            multiply_block<T, 4, true>(count, job, from, to);
        else if (panel_count == 2)
            blocks == 1 ? multiply_block<T, 2, true>(count, job, from, to)
                        : multiply_block<T, 2, false>(count, job, from, to);
        else
            blocks == 1 ? multiply_block<T, 1, true>(count, job, from, to)
                        : multiply_block<T, 1, false>(count, job, from, to);
    }
}
