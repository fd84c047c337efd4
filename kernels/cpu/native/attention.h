// Attention over block tables. Included by each variant (see panels.h).
//
// The positions of a sequence are cut into tiles of 256, counted from position 0. A tile's softmax has a maximum of its
// own, and tiles are added up in order:
//
//     tile t:   m_t = max s,   l_t = sum e^(s - m_t),   o_t = sum e^(s - m_t) v
//     fold:     m' = max(m, m_t),   l = l e^(m - m') + l_t e^(m_t - m'),   o likewise
//
// so a query's result is a function of its own positions alone. What is masked has a weight of exactly zero and adds
// exact zeros. (Online softmax: Milakov and Gimelshein 2018; in tiles: Dao et al. 2022.)
//
// A piece of work is some tiles of some heads. One that has all tiles folds them as it goes; others leave m, l and o of
// each tile, and `merge` folds those: the same numbers in the same order, so a cut changes no bit.
//
// Where the cache has scales (see cache.h), a score is multiplied by that of its key, and a weight by that of its value,
// after l_t was summed.
//
// Memory is fastest read in the order in which it lies. There a block has, for a layer, the keys of all heads, then the
// values of all heads,
//
//     block   | K0 K1 K2 | V0 V1 V2 |
//
// but products go head by head. So a tile is done in units: the keys of some heads, then their values. While a unit is
// multiplied line by line, out of the second-level cache, the one after it is asked for in its memory's order. (Asked
// for in the order of the products, memory gave a fifth less.)

template <class L>
struct AttentionScratch {
    using A = typename L::Activation;

    static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

    // Of a piece with so many heads, each of which so many rows attend to.
    static size_t bytes(int rows, int heads, int head_dim) {
        const size_t r = static_cast<size_t>(rows), all = r * heads;
        return rounded(all * head_dim * sizeof(A)) + rounded(all * kTile * sizeof(float)) +
               rounded(all * kTile * sizeof(A)) + rounded(r * head_dim * sizeof(float)) +
               rounded(all * head_dim * sizeof(float)) + 2 * rounded(all * sizeof(float)) +
               2 * rounded(all * sizeof(float)) + rounded(static_cast<size_t>(kLane) * head_dim * 2) +
               rounded(kTile * sizeof(float)) + decoded_bytes(head_dim);
    }

    // Of what is multiplied at once, if it may have to be decoded: four panels of keys, or of values in a whole tile.
    static size_t decoded_bytes(int head_dim) {
        if (L::Tiles::kRows == 0) return 0;
        const int inputs = head_dim > kTile ? head_dim : kTile;
        return 4 * Bf16Reader<L>::bytes(inputs / 2);
    }

    AttentionScratch(void *memory, int rows, int heads, int head_dim) {
        auto *next = static_cast<char *>(memory);
        const auto take = [&next](size_t size) {
            char *part = next;
            next += rounded(size);
            return part;
        };
        const size_t r = static_cast<size_t>(rows), all = r * heads;
        queries = reinterpret_cast<A *>(take(all * head_dim * sizeof(A)));
        scores = reinterpret_cast<float *>(take(all * kTile * sizeof(float)));
        weights = reinterpret_cast<A *>(take(all * kTile * sizeof(A)));
        mixed = reinterpret_cast<float *>(take(r * head_dim * sizeof(float)));
        total = reinterpret_cast<float *>(take(all * head_dim * sizeof(float)));
        tile_most = reinterpret_cast<float *>(take(all * sizeof(float)));
        tile_sum = reinterpret_cast<float *>(take(all * sizeof(float)));
        most = reinterpret_cast<float *>(take(all * sizeof(float)));
        sum = reinterpret_cast<float *>(take(all * sizeof(float)));
        tail = reinterpret_cast<uint16_t *>(take(static_cast<size_t>(kLane) * head_dim * 2));
        scales = reinterpret_cast<float *>(take(kTile * sizeof(float)));
        decoded = take(decoded_bytes(head_dim));
    }

    A *queries;                   // [head][row][head_dim]
    float *scores;                // [head][row][kTile]
    A *weights;                   // [head][row][kTile]
    float *mixed;                 // [row][head_dim]: o_t
    float *total;                 // [head][row][head_dim]: o
    float *tile_most, *tile_sum;  // [head][row]: m_t, l_t
    float *most, *sum;            // [head][row]: m, l
    uint16_t *tail;               // bf16 values of the last, partly filled 16 positions of a head; the rest zero
    float *scales;                // [kTile]: of a head's values; zero past the end
    char *decoded;                // panels in bf16
};

// Softmax of columns [low, high) of a row of scores, zero in the rest of [first, end). Returns m_t and l_t. Weights are
// multiplied by `scales`, unless that is null.
template <class L>
void soften(float *scores, const float *scales, typename L::Activation *weights, int first, int end, int low, int high,
            float &most, float &sum) {
    using V = typename L::Vector;
    constexpr float kInfinity = __builtin_inff();
    for (int i = first; i < low; ++i) scores[i] = -kInfinity;
    for (int i = high; i < end; ++i) scores[i] = -kInfinity;
    V top = L::set(-kInfinity);
    for (int i = first; i < end; i += L::kCount) top = L::max(top, L::load(scores + i));
    most = largest<L>(top);
    V sums = L::set(0.0f);
    for (int i = first; i < end; i += L::kCount) {
        const V weight = exponential<L>(L::load(scores + i) - L::set(most));
        sums = sums + weight;
        L::narrow(weights + i, scales ? weight * L::load(scales + i) : weight);
    }
    sum = total<L>(sums);
}

// Adds a tile to what is folded already.
template <class L>
void fold(const float *mixed, float tile_most, float tile_sum, int head_dim, float *total, float &most, float &sum) {
    using V = typename L::Vector;
    const float new_most = most > tile_most ? most : tile_most;
    const V keep = exponential<L>(L::set(most - new_most)), add = exponential<L>(L::set(tile_most - new_most));
    for (int i = 0; i < head_dim; i += L::kCount)
        L::store(total + i, L::fma(L::load(mixed + i), add, L::load(total + i) * keep));
    alignas(64) float sums[L::kCount];
    L::store(sums, L::fma(L::set(tile_sum), add, L::set(sum) * keep));
    sum = sums[0];
    most = new_most;
}

// Writes a query's result.
template <class L>
void finish_query(const float *total, float sum, int head_dim, typename L::Activation *out) {
    const typename L::Vector scale = L::set(1.0f / sum);
    for (int i = 0; i < head_dim; i += L::kCount) L::narrow(out + i, L::load(total + i) * scale);
}

// What a tile of a head leaves in a piece's `parts`: [row][head_dim] of o_t, then m_t and l_t of each row.
struct PartialTile {
    // `tile` counts from the piece's first, `head` from the model's first.
    PartialTile(float *parts, int tile, int head, int kv_heads, int rows, int head_dim)
        : mixed(parts + (static_cast<ptrdiff_t>(tile) * kv_heads + head) * rows * (head_dim + 2)),
          most(mixed + static_cast<ptrdiff_t>(rows) * head_dim),
          sum(most + rows) {}

    float *const mixed, *const most, *const sum;
};

// Keys, or values, of some heads of a tile: what is multiplied in one go, while the unit after it is asked for.
struct Unit {
    const Span *span;  // null: there is none
    int base, first_head, head_count;
    bool values;
};

// The memory of a unit, in the order in which it lies there.
class UnitMemory {
   public:
    UnitMemory(const Attention &job, size_t run_size, const Unit &unit)
        : job_(job), unit_(unit), head_size_(job.block_size / kLane * run_size) {
        if (!unit.span) return;
        const int tile_end = unit.base + kTile < unit.span->context ? unit.base + kTile : unit.span->context;
        const int first_position = unit.span->context - unit.span->count;
        const int start = job.window ? first_position + 1 - job.window : 0;
        block_ = (start > unit.base ? start : unit.base) / job.block_size;
        end_ = (tile_end + job.block_size - 1) / job.block_size;
    }

    // The next `bytes`; null at the end. What is left of a block and is less is passed over.
    const void *take(size_t bytes) {
        if (left_ < bytes) {
            if (block_ >= end_) return nullptr;
            const int heads_before = unit_.first_head + (unit_.values ? job_.kv_heads : 0);
            at_ = job_.layer_cache + unit_.span->table[block_++] * job_.block_stride + heads_before * head_size_;
            left_ = unit_.head_count * head_size_;
        }
        const char *taken = at_;
        at_ += bytes;
        left_ -= bytes;
        return taken;
    }

   private:
    const Attention &job_;
    const Unit unit_;
    const size_t head_size_;
    int block_ = 0, end_ = 0;
    const char *at_ = nullptr;
    size_t left_ = 0;
};

template <class L, class Cache>
class PieceAttention {
    using Reader = typename Cache::Reader;
    // Tiles multiply bf16 alone: what is stored otherwise is decoded first.
    static constexpr bool kDecodes = L::Tiles::kRows > 0 && !in_tiles<L, Reader>;
    using Factor = std::conditional_t<kDecodes, typename L::Decoded, Reader>;
    static constexpr bool kScaled = Cache::kPanel > 0;
    using A = typename L::Activation;
    using V = typename L::Vector;

   public:
    PieceAttention(const Attention &job, const Piece &piece, void *memory)
        : job_(job),
          piece_(piece),
          span_(*piece.span),
          group_(job.heads / job.kv_heads),
          rows_(span_.count * group_),
          run_size_(run_bytes(Cache::kFormat, job.head_dim)),
          scratch_(memory, rows_, piece.head_count, job.head_dim) {}

    // `next` is the piece that is likely to come next, or null.
    void attend_all(const Piece *next) {
        gather_queries();
        for (int tile = piece_.first_tile; tile < piece_.end_tile; ++tile)
            for (int head = piece_.first_head; head < end_of(piece_);) {
                const Unit keys = keys_of(piece_, tile, head);
                attend(keys, keys_after(keys, next));
                head += keys.head_count;
            }
        if (piece_.parts) return;
        for (int i = 0; i < rows_ * piece_.head_count; ++i)
            finish_query<L>(scratch_.total + i * job_.head_dim, scratch_.sum[i], job_.head_dim,
                            row_of(job_.out, i / rows_, i % rows_));
    }

   private:
    static int max_of(int a, int b) { return a > b ? a : b; }
    static int min_of(int a, int b) { return a < b ? a : b; }
    static int end_of(const Piece &piece) { return piece.first_head + piece.head_count; }

    Unit keys_of(const Piece &piece, int tile, int head) const {
        const int together = max_of(1, kUnitBytes / (kTile / kLane * static_cast<int>(run_size_)));
        return {piece.span, tile * kTile, head, min_of(together, end_of(piece) - head), false};
    }

    Unit keys_after(const Unit &unit, const Piece *next) const {
        const int tile = unit.base / kTile, head = unit.first_head + unit.head_count;
        if (head < end_of(piece_)) return keys_of(piece_, tile, head);
        if (tile + 1 < piece_.end_tile) return keys_of(piece_, tile + 1, piece_.first_head);
        if (next) return keys_of(*next, next->first_tile, next->first_head);
        return {nullptr, 0, 0, 0, false};
    }

    void attend(const Unit &keys, const Unit &after) {
        const int base = keys.base, first_position = span_.context - span_.count;
        const int start = job_.window ? max_of(0, first_position + 1 - job_.window) : 0;
        const int first = max_of(start, base) / kLane * kLane - base;
        const int end = (min_of(span_.context, base + kTile) + kLane - 1) / kLane * kLane - base;
        const int end_head = keys.first_head + keys.head_count;
        UnitMemory values_ahead(job_, run_size_, {&span_, base, keys.first_head, keys.head_count, true});
        UnitMemory keys_ahead(job_, run_size_, after);
        for (int head = keys.first_head; head < end_head; ++head) {
            score(head, base, first, end, values_ahead);
            soften_rows(head, base, first, end, values_ahead);
        }
        for (int head = keys.first_head; head < end_head; ++head) {
            const int at = (head - piece_.first_head) * rows_;
            if (piece_.parts) {
                const PartialTile part(piece_.parts, base / kTile - piece_.first_tile, head, job_.kv_heads, rows_,
                                       job_.head_dim);
                mix(head, base, first, end, part.mixed, keys_ahead);
                for (int row = 0; row < rows_; ++row) {
                    part.most[row] = scratch_.tile_most[at + row];
                    part.sum[row] = scratch_.tile_sum[at + row];
                }
                continue;
            }
            mix(head, base, first, end, scratch_.mixed, keys_ahead);
            for (int row = 0; row < rows_; ++row) {
                ask_for(keys_ahead, run_size_ / (job_.head_dim / kLane));
                if (scratch_.tile_sum[at + row] != 0.0f)
                    fold<L>(scratch_.mixed + row * job_.head_dim, scratch_.tile_most[at + row],
                            scratch_.tile_sum[at + row], job_.head_dim, scratch_.total + (at + row) * job_.head_dim,
                            scratch_.most[at + row], scratch_.sum[at + row]);
            }
        }
    }

    void soften_rows(int head, int base, int first, int end, UnitMemory &memory) {
        if constexpr (kScaled) gather_scales(head, base, first, end);
        const int first_position = span_.context - span_.count, at = (head - piece_.first_head) * rows_;
        for (int row = at; row < at + rows_; ++row) {
            ask_for(memory, run_size_);
            const int position = first_position + (row - at) / group_;
            const int low = max_of(first, job_.window ? position + 1 - job_.window - base : 0);
            const int high = min_of(end, position + 1 - base);
            scratch_.tile_sum[row] = 0.0f;
            if (low < high)
                soften<L>(scratch_.scores + row * kTile, kScaled ? scratch_.scales : nullptr,
                          scratch_.weights + row * kTile, first, end, low, high, scratch_.tile_most[row],
                          scratch_.tile_sum[row]);
            else  // bits of zero are zero in float and in bf16
                __builtin_memset(scratch_.weights + row * kTile + first, 0, (end - first) * sizeof(A));
        }
    }

    // While nothing is multiplied, memory would have nothing to do.
    static void ask_for(UnitMemory &memory, size_t bytes) {
        const auto *lines = static_cast<const char *>(memory.take(bytes));
        for (size_t i = 0; lines && i < bytes; i += 64) __builtin_prefetch(lines + i, 0, 2);
    }

    // The panel of keys of 16 positions from `position` on; values lie `kv_heads` heads further.
    const char *keys(ptrdiff_t kv_head, int position) const {
        const int64_t block = span_.table[position / job_.block_size];
        const int runs = job_.block_size / kLane, run = position % job_.block_size / kLane;
        return job_.layer_cache + block * job_.block_stride + (kv_head * runs + run) * run_size_ + Cache::kPanel;
    }

    const char *values(int kv_head, int position) const { return keys(job_.kv_heads + kv_head, position); }

    // Of the 16 positions of a panel.
    static const float *scales_of(const void *panel) {
        return reinterpret_cast<const float *>(static_cast<const char *>(panel) - Cache::kPanel);
    }

    A *row_of(const void *rows, int head, int row) const {
        const ptrdiff_t stride = static_cast<ptrdiff_t>(job_.heads) * job_.head_dim;
        return static_cast<A *>(const_cast<void *>(rows)) + (span_.first_row + row / group_) * stride +
               ((piece_.first_head + head) * group_ + row % group_) * job_.head_dim;
    }

    void gather_queries() {
        for (int i = 0; i < rows_ * piece_.head_count; ++i) {
            __builtin_memcpy(scratch_.queries + i * job_.head_dim, row_of(job_.queries, i / rows_, i % rows_),
                             job_.head_dim * sizeof(A));
            scratch_.most[i] = -__builtin_inff();
            scratch_.sum[i] = 0.0f;
            for (int e = 0; e < job_.head_dim; ++e) scratch_.total[i * job_.head_dim + e] = 0.0f;
        }
    }

    // A block's slots past the end hold what an earlier owner left, which may be NaN: zero times that is not zero. Among
    // scales it may be, too; bytes are always numbers.
    void gather_scales(int kv_head, int base, int first, int end) {
        for (int at = first; at < end; at += kLane) {
            __builtin_memcpy(scratch_.scales + at, scales_of(values(kv_head, base + at)), kLane * sizeof(float));
            for (int i = max_of(at, span_.context - base); i < at + kLane; ++i) scratch_.scales[i] = 0.0f;
        }
    }

    const char *copy_tail(int kv_head) {
        const int filled = span_.context % kLane;
        const auto *from = reinterpret_cast<const uint16_t *>(values(kv_head, span_.context - filled));
        for (int part = 0; part < job_.head_dim / kLane; ++part)
            for (int pair = 0; pair < kLane / 2; ++pair)
                for (int i = 0; i < 2 * kLane; ++i) {
                    const int at = (part * (kLane / 2) + pair) * 2 * kLane + i;
                    scratch_.tail[at] = 2 * pair + i % 2 < filled ? from[at] : 0;
                }
        return reinterpret_cast<const char *>(scratch_.tail);
    }

    void score(int head, int base, int first, int end, UnitMemory &memory) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(head - piece_.first_head) * rows_;
        const void *panels[4], *ahead[4];
        for (int column = first; column < end;) {
            const int count = panels_together<L, Factor>(rows_, (end - column) / kLane);
            for (int p = 0; p < count; ++p) {
                panels[p] = keys(head, base + column + p * kLane);
                ahead[p] = memory.take(run_size_);
                if (!ahead[p]) ahead[p] = panels[p];
                // One line more than a panel has.
                if constexpr (kScaled) __builtin_prefetch(static_cast<const char *>(ahead[p]) + run_size_ - 64, 0, 2);
            }
            float *scores = scratch_.scores + at * kTile + column;
            multiply(panels, count, 1, job_.head_dim / 2, scratch_.queries + at * job_.head_dim, job_.head_dim, scores,
                     kTile, ahead);
            if constexpr (kScaled) scale_scores(panels, count, scores);
            column += count * kLane;
        }
    }

    void multiply(const void *const *panels, int count, int segments, int pairs, const A *rows, int row_stride,
                  float *out, int out_stride, const void *const *ahead) const {
        if constexpr (kDecodes) {
            const void *decoded[kTile / kLane * 4];
            decode_panels<L, Reader>(panels, segments * count, pairs, scratch_.decoded, ahead, decoded);
            multiply_rows<L, Factor>(decoded, count, segments, pairs, rows, row_stride, rows_, out, out_stride);
        } else {
            multiply_rows<L, Reader>(panels, count, segments, pairs, rows, row_stride, rows_, out, out_stride, ahead);
        }
    }

    void scale_scores(const void *const *panels, int count, float *scores) const {
        for (int row = 0; row < rows_; ++row, scores += kTile)
            for (int p = 0; p < count; ++p)
                for (int i = 0; i < kLane; i += L::kCount) {
                    float *at = scores + p * kLane + i;
                    L::store(at, L::load(at) * L::load(scales_of(panels[p]) + i));
                }
    }

    void mix(int head, int base, int first, int end, float *mixed, UnitMemory &memory) {
        const int segments = (end - first) / kLane, parts = job_.head_dim / kLane;
        const char *starts[kTile / kLane];
        const void *panels[kTile / kLane * 4], *ahead[kTile / kLane * 4];
        const A *weights = scratch_.weights + static_cast<ptrdiff_t>(head - piece_.first_head) * rows_ * kTile;
        for (int s = 0; s < segments; ++s) {
            const int position = base + first + s * kLane;
            const bool partly = !kScaled && position + kLane > span_.context;
            starts[s] = partly ? copy_tail(head) : values(head, position);
        }
        for (int part = 0; part < parts;) {
            const int count = panels_together<L, Factor>(rows_, parts - part);
            for (int i = 0; i < segments * count; ++i) {
                panels[i] = starts[i / count] + (part + i % count) * Reader::bytes(kLane / 2);
                ahead[i] = memory.take(run_size_ / parts);
                if (!ahead[i]) ahead[i] = panels[i];
            }
            multiply(panels, count, segments, kLane / 2, weights + first, kTile, mixed + part * kLane, job_.head_dim,
                     ahead);
            part += count;
        }
    }

    const Attention &job_;
    const Piece &piece_;
    const Span &span_;
    const int group_, rows_;
    const size_t run_size_;
    AttentionScratch<L> scratch_;
};

template <class L>
void attend(const Attention &job, const Piece &piece, const Piece *next, void *scratch) {
    const TileUse<L> tiles;
    if (job.format == CacheFormat::kBf16)
        PieceAttention<L, Bf16Cache<L>>(job, piece, scratch).attend_all(next);
    else
        PieceAttention<L, Int8Cache<L>>(job, piece, scratch).attend_all(next);
}

// Folds the tiles of a span that was cut, and writes its results. The piece has all tiles and heads.
template <class L>
void merge(const Attention &job, const Piece &piece) {
    using A = typename L::Activation;
    const int group = job.heads / job.kv_heads, rows = piece.span->count * group, head_dim = job.head_dim;
    alignas(64) float total[kHeadLimit];
    for (int head = 0; head < job.kv_heads; ++head)
        for (int row = 0; row < rows; ++row) {
            float most = -__builtin_inff(), sum = 0.0f;
            for (int i = 0; i < head_dim; ++i) total[i] = 0.0f;
            for (int tile = 0; tile < piece.end_tile - piece.first_tile; ++tile) {
                const PartialTile part(piece.parts, tile, head, job.kv_heads, rows, head_dim);
                if (part.sum[row] != 0.0f)
                    fold<L>(part.mixed + row * head_dim, part.most[row], part.sum[row], head_dim, total, most, sum);
            }
            const ptrdiff_t stride = static_cast<ptrdiff_t>(job.heads) * head_dim;
            finish_query<L>(total, sum, head_dim,
                            static_cast<A *>(job.out) + (piece.span->first_row + row / group) * stride +
                                (head * group + row % group) * head_dim);
        }
}
