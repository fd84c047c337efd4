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
//     0..3    sums: [0, 1] of the first rows and [2, 3] of the next 16, for two panels; or [0..3] for four panels
//     4, 5    activations
//     6, 7    weights
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

// Panel P of the weights, with one or two tiles of activations.
template <class T, int RowTiles, int P>
void multiply_tile(const char *weights) {
    constexpr int kWeights = 6 + P % 2;
    T::template load<kWeights>(weights, 64);
    T::template multiply<P, 4, kWeights>();
    if constexpr (RowTiles == 2) T::template multiply<2 + P, 5, kWeights>();
}

// One or two tiles of rows, which begin at `first` and `second`. `depth` is the pairs of inputs of a tile.
template <class L, int RowTiles, int Panels>
void multiply_row_tiles(const void *const *panels, int segments, int pairs, int depth, const uint16_t *first,
                        const uint16_t *second, int row_stride, float *first_out, float *second_out, int out_stride,
                        const void *const *next, int next_first, int next_count) {
    using T = typename L::Tiles;
    static_assert(RowTiles * Panels <= 4, "there are four tiles of sums");
    const ptrdiff_t stride = row_stride * static_cast<ptrdiff_t>(sizeof(uint16_t));
    const ptrdiff_t out_bytes = out_stride * static_cast<ptrdiff_t>(sizeof(float));
    T::template zero<0>();
    if constexpr (Panels > 1) T::template zero<1>();
    if constexpr (RowTiles == 2 || Panels > 2) T::template zero<2>();
    if constexpr (RowTiles * Panels == 4) T::template zero<3>();
    for (int segment = 0; segment < segments; ++segment) {
        const char *weights[Panels], *ahead[Panels];
        for (int p = 0; p < Panels; ++p) {
            weights[p] = static_cast<const char *>(panels[segment * Panels + p]);
            ahead[p] = static_cast<const char *>(next[segment * Panels + p]) + next_first * 64;
        }
        for (int pair = 0; pair < pairs; pair += depth) {
            for (int p = 0; p < Panels; ++p)
                for (int i = 0; i < next_count; ++i) __builtin_prefetch(ahead[p] + i * 64, 0, 2);
            T::template load<4>(first, stride);
            if constexpr (RowTiles == 2) T::template load<5>(second, stride);
            multiply_tile<T, RowTiles, 0>(weights[0]);
            if constexpr (Panels > 1) multiply_tile<T, RowTiles, 1>(weights[1]);
            if constexpr (Panels > 2) {
                multiply_tile<T, RowTiles, 2>(weights[2]);
                multiply_tile<T, RowTiles, 3>(weights[3]);
            }
            for (int p = 0; p < Panels; ++p) weights[p] += depth * 64, ahead[p] += depth * 64;
            first += 2 * depth;
            second += 2 * depth;
        }
    }
    T::template store<0>(first_out, out_bytes);
    if constexpr (Panels > 1) T::template store<1>(first_out + kLane, out_bytes);
    if constexpr (Panels > 2) {
        T::template store<2>(first_out + 2 * kLane, out_bytes);
        T::template store<3>(first_out + 3 * kLane, out_bytes);
    }
    if constexpr (RowTiles == 2) {
        T::template store<2>(second_out, out_bytes);
        if constexpr (Panels > 1) T::template store<3>(second_out + kLane, out_bytes);
    }
}

// As multiply_rows of panels.h, with `panel_count` from tile_panels.
template <class L>
void multiply_in_tiles(const void *const *panels, int panel_count, int segments, int pairs, const uint16_t *rows,
                       int row_stride, int row_count, float *out, int out_stride, const void *const *next) {
    const int depth = pairs % 16 ? 8 : 16;
    // Tiles of one height: where the rows do not divide evenly, the last one begins among those of the tile before it,
    // and computes some of them again.
    const int tiles = (row_count + L::Tiles::kRows - 1) / L::Tiles::kRows, height = (row_count + tiles - 1) / tiles;
    const int blocks = (tiles + 1) / 2;
    // Each block of rows asks for a part of what comes next.
    const int asked = next ? (depth + blocks - 1) / blocks : 0;
    if (!next) next = panels;
    L::Tiles::shape(height, depth);
    const auto start_of = [&](int tile) {
        return static_cast<ptrdiff_t>(tile + 1 < tiles ? tile * height : row_count - height);
    };
    for (int block = 0; block < blocks; ++block) {
        const ptrdiff_t one = start_of(2 * block), two = start_of(2 * block + 1 < tiles ? 2 * block + 1 : 2 * block);
        const auto *first = rows + one * row_stride, *second = rows + two * row_stride;
        float *first_out = out + one * out_stride, *second_out = out + two * out_stride;
        const auto run = [&](auto routine) {
            routine(panels, segments, pairs, depth, first, second, row_stride, first_out, second_out, out_stride, next,
                    block * asked, asked < depth - block * asked ? asked : depth - block * asked);
        };
        if (panel_count == 4)
            run(&multiply_row_tiles<L, 1, 4>);
        else if (panel_count == 2)
            run(one == two ? &multiply_row_tiles<L, 1, 2> : &multiply_row_tiles<L, 2, 2>);
        else
            run(one == two ? &multiply_row_tiles<L, 1, 1> : &multiply_row_tiles<L, 2, 1>);
    }
}
