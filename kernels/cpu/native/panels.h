// Products with packed matrices. Included by each variant, with its `Lanes`, inside an anonymous namespace: code that
// was compiled for one instruction set must never be merged with that of another.
//
// A matrix [output][input] of bf16 lies in panels of 16 outputs:
//
//     [output / 16][input / 2][16][2]        one row of a panel = 64 bytes = 16 outputs x 2 neighbouring inputs
//
//     row 0   o0 i0 | o0 i1 | o1 i0 | o1 i1 | ... | o15 i0 | o15 i1
//     row 1   o0 i2 | o0 i3 | o1 i2 | o1 i3 | ...
//
// which is what a dot product of bf16 pairs takes, and from which float is a shift (even inputs) or a mask (odd ones).
// Keys and values of the cache are panels too, so one routine multiplies all three:
//
//     what      outputs          inputs
//     weights   features         features
//     keys      16 positions     elements of a head
//     values    16 elements      16 positions
//
// Every output is summed over its inputs one after the other, from zero, in one accumulator, whatever the number of rows
// or outputs beside it: that is why a result never depends on company.

// What comes next from memory, asked for bit by bit while the processor multiplies.
struct Ahead {
    const void *const *panels;  // [segment][panel], as those that are multiplied; never null
    ptrdiff_t from, step;       // bytes from there to begin at, and for each row of a panel
};

template <class L, class Reader, int Rows, int Panels>
void multiply(const void *const *panels, int segments, int pairs, const typename L::Activation *rows,
              int row_stride, float *out, int out_stride, Ahead ahead) {
    constexpr int kVectors = kLane / L::kCount;
    typename L::Vector sums[Rows][Panels * kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < Panels * kVectors; ++v) sums[r][v] = L::set(0.0f);
    const ptrdiff_t stride = row_stride;
    for (int segment = 0; segment < segments; ++segment) {
        Reader reader[Panels];
        const char *next[Panels];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) {
            reader[p].start(panels[segment * Panels + p]);
            next[p] = static_cast<const char *>(ahead.panels[segment * Panels + p]) + ahead.from;
        }
        const auto *const end = rows + 2 * pairs;
        while (rows != end) {
#pragma GCC unroll 4
            for (int p = 0; p < Panels; ++p) reader[p].open();
            for (const auto *group = Reader::kGroup ? rows + 2 * Reader::kGroup : end; rows != group; rows += 2) {
#pragma GCC unroll 4
                for (int p = 0; p < Panels; ++p) {
                    __builtin_prefetch(next[p], 0, 2);
                    next[p] += ahead.step;
                }
#pragma GCC unroll 2
                for (int half = 0; half < L::kHalves; ++half) {
                    typename L::Operand weights[Panels * kVectors];
#pragma GCC unroll 16
                    for (int v = 0; v < Panels * kVectors; ++v)
                        weights[v] = reader[v / kVectors].weights(v % kVectors, half);
#pragma GCC unroll 16
                    for (int r = 0; r < Rows; ++r) {
                        const typename L::Operand input = L::input(rows + r * stride, half);
#pragma GCC unroll 16
                        for (int v = 0; v < Panels * kVectors; ++v)
                            sums[r][v] = L::dot(sums[r][v], weights[v], input);
                        // Nothing is loaded ahead of its use: it would push sums out of the registers.
                        asm volatile("" ::: "memory");
                    }
                }
#pragma GCC unroll 4
                for (int p = 0; p < Panels; ++p) reader[p].next();
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < Panels * kVectors; ++v) L::store(out + r * out_stride + v * L::kCount, sums[r][v]);
}

template <class L>
using Multiply = void (*)(const void *const *, int, int, const typename L::Activation *, int, float *, int, Ahead);

// Routines for 1, 2, ... rows.
template <class L, class Reader, int Panels, int... Index>
Multiply<L> routine(int rows, std::integer_sequence<int, Index...>) {
    static constexpr Multiply<L> kRoutines[] = {&multiply<L, Reader, Index + 1, Panels>...};
    return kRoutines[rows - 1];
}

// How many panels so many rows multiply at once, of those that there are. More panels are more sums that do not wait for
// each other, as far as the registers suffice.
template <class L, class Reader>
constexpr int panels_together(int row_count, int panel_count) {
    if constexpr (in_tiles<L, Reader>) return tile_panels<L>(row_count, panel_count);
    if (panel_count >= 4 && row_count <= L::kRowsOfFour) return 4;
    return panel_count >= 2 && (row_count <= L::kRowsOfTwo || L::kRowsOfTwo >= L::kRowsOfOne) ? 2 : 1;
}

// Any number of rows, cut as evenly as the registers allow. `panels` holds, for each segment, `panel_count`, which
// panels_together has chosen. So does `next`: what to ask for meanwhile. Null: nothing.
template <class L, class Reader>
void multiply_rows(const void *const *panels, int panel_count, int segments, int pairs,
                   const typename L::Activation *rows, int row_stride, int row_count, float *out, int out_stride,
                   const void *const *next = nullptr) {
    if constexpr (in_tiles<L, Reader>) {
        multiply_in_tiles<L>(panels, panel_count, segments, pairs, rows, row_stride, row_count, out, out_stride, next);
        return;
    }
    const int limit = panel_count == 4 ? L::kRowsOfFour : panel_count == 2 ? L::kRowsOfTwo : L::kRowsOfOne;
    const int blocks = (row_count + limit - 1) / limit;
    // What is near already costs least to ask for.
    Ahead ahead{next ? next : panels, 0, next ? Reader::kPairBytes / blocks : 0};
    for (int block = 0, first = 0; block < blocks; ++block) {
        const int count = (row_count - first) / (blocks - block);
        const auto *from = rows + static_cast<ptrdiff_t>(first) * row_stride;
        float *to = out + static_cast<ptrdiff_t>(first) * out_stride;
        if (panel_count == 4) {
            if constexpr (L::kRowsOfFour > 0)
                routine<L, Reader, 4>(count, std::make_integer_sequence<int, L::kRowsOfFour>{})(
                    panels, segments, pairs, from, row_stride, to, out_stride, ahead);
        } else if (panel_count == 2) {
            routine<L, Reader, 2>(count, std::make_integer_sequence<int, L::kRowsOfTwo>{})(
                panels, segments, pairs, from, row_stride, to, out_stride, ahead);
        } else {
            routine<L, Reader, 1>(count, std::make_integer_sequence<int, L::kRowsOfOne>{})(
                panels, segments, pairs, from, row_stride, to, out_stride, ahead);
        }
        ahead.from += ahead.step * pairs;
        first += count;
    }
}

// Outputs of two neighbouring panels; `next` are the two after them.
template <class L, class Reader>
void multiply_two(const void *const panels[2], int pairs, const typename L::Activation *rows, int row_stride,
                  int row_count, float *out, int out_stride, const void *const *next = nullptr) {
    const int together = panels_together<L, Reader>(row_count, 2);
    for (int p = 0; p < 2; p += together)
        multiply_rows<L, Reader>(panels + p, together, 1, pairs, rows, row_stride, row_count, out + p * kLane,
                                 out_stride, next ? next + p : nullptr);
}

// The same for panels that are stored in few bits. For few rows weights are decoded in registers, for more of them once
// into `scratch`: the weights are the same, and so are the sums.
template <class L, class Reader>
void multiply_decoded(const void *const panels[2], int pairs, const typename L::Activation *rows, int row_stride,
                      int row_count, float *out, int out_stride, const void *const *next, char *scratch) {
    if (row_count <= L::kRowsDecoding) {
        multiply_two<L, Reader>(panels, pairs, rows, row_stride, row_count, out, out_stride, next);
        return;
    }
    const void *decoded[2];
    decode_panels<L, Reader>(panels, 2, pairs, scratch, next, decoded);
    multiply_two<L, typename L::Decoded>(decoded, pairs, rows, row_stride, row_count, out, out_stride);
}

template <class L>
size_t panel_bytes(Format format, int inputs) {
    switch (format) {
        case Format::kBf16:
            return Bf16Reader<L>::bytes(inputs / 2);
        case Format::kFourBits:
            return FourBitReader<L>::bytes(inputs / 2);
        case Format::kEightBits:
            return EightBitReader<L, kGroupInputs>::bytes(inputs / 2);
        case Format::kEightBitsOf16:
            return EightBitReader<L, kGroupInputs / 2>::bytes(inputs / 2);
    }
    return 0;
}

template <class L>
size_t product_scratch(int inputs) {
    return 2 * L::Decoded::bytes(inputs / 2);
}

template <class L>
void finish(const Product &job, const float *tile, int first_row, int row_count, int pair) {
    using V = typename L::Vector;
    const int first = pair * kPair;
    for (int r = 0; r < row_count; ++r, tile += kPair) {
        const ptrdiff_t row = static_cast<ptrdiff_t>(first_row + r) * job.out_stride;
        if (job.epilogue == Epilogue::kSwiGLU) {
            auto *out = static_cast<typename L::Activation *>(job.activations) + row + pair * kLane;
            for (int i = 0; i < kLane; i += L::kCount) {
                const V gate = L::load(tile + i), up = L::load(tile + kLane + i);
                L::narrow(out + i, gate / (L::set(1.0f) + exponential<L>(L::set(0.0f) - gate)) * up);
            }
            continue;
        }
        float *out = job.out + row + first;
        for (int i = 0; i < kPair; i += L::kCount) {
            V value = L::load(tile + i);
            if (job.bias) value = value + L::load(job.bias + first + i);
            if (job.epilogue == Epilogue::kAdd) value = L::load(out + i) + value;
            L::store(out + i, value);
        }
    }
}

template <class L, class Reader>
void product_of(const Product &job, int first_row, int end_row, int first_pair, int end_pair, char *scratch) {
    alignas(64) float tile[L::Tiles::kProductRows * kPair];
    const auto *rows = static_cast<const typename L::Activation *>(job.rows) +
                       static_cast<ptrdiff_t>(first_row) * job.row_stride;
    const int row_count = end_row - first_row;
    const size_t size = Reader::bytes(job.pairs);
    const TileUse<L> tiles;
    for (int pair = first_pair; pair < end_pair; ++pair) {
        const char *panel = static_cast<const char *>(job.panels) + 2 * pair * size, *after = panel + 2 * size;
        if (pair + 1 == end_pair && job.next) after = static_cast<const char *>(job.next);
        const void *const panels[2] = {panel, panel + size}, *const next[2] = {after, after + size};
        if constexpr (Reader::kGroup == 0)
            multiply_two<L, Reader>(panels, job.pairs, rows, job.row_stride, row_count, tile, kPair, next);
        else
            multiply_decoded<L, Reader>(panels, job.pairs, rows, job.row_stride, row_count, tile, kPair,
                                        next, scratch);
        finish<L>(job, tile, first_row, row_count, pair);
    }
}

template <class L>
void product(const Product &job, int first_row, int end_row, int first_pair, int end_pair, void *scratch) {
    auto *memory = static_cast<char *>(scratch);
    switch (job.format) {
        case Format::kBf16:
            return product_of<L, Bf16Reader<L>>(job, first_row, end_row, first_pair, end_pair, memory);
        case Format::kFourBits:
            return product_of<L, FourBitReader<L>>(job, first_row, end_row, first_pair, end_pair, memory);
        case Format::kEightBits:
            return product_of<L, EightBitReader<L, kGroupInputs>>(job, first_row, end_row, first_pair, end_pair, memory);
        case Format::kEightBitsOf16:
            return product_of<L, EightBitReader<L, kGroupInputs / 2>>(job, first_row, end_row, first_pair, end_pair,
                                                                      memory);
    }
}
