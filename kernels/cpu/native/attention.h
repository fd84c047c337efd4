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
// Within a piece tiles come first, then heads: what the processor fetches past the end of a head's keys is the next
// head's. While the keys of one head of a tile are multiplied, those of the head after it are asked for line by line,
// and likewise values.

template <class L>
struct AttentionScratch {
    using A = typename L::Activation;

    static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

    // Of a piece with so many heads, each of which so many rows attend to.
    static size_t bytes(int rows, int heads, int head_dim) {
        const size_t r = static_cast<size_t>(rows), all = r * heads;
        return rounded(all * head_dim * sizeof(A)) + rounded(r * kTile * sizeof(float)) +
               rounded(r * kTile * sizeof(A)) + rounded(r * head_dim * sizeof(float)) +
               rounded(all * head_dim * sizeof(float)) + 2 * rounded(r * sizeof(float)) +
               2 * rounded(all * sizeof(float)) + rounded(static_cast<size_t>(kLane) * head_dim * 2);
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
        scores = reinterpret_cast<float *>(take(r * kTile * sizeof(float)));
        weights = reinterpret_cast<A *>(take(r * kTile * sizeof(A)));
        mixed = reinterpret_cast<float *>(take(r * head_dim * sizeof(float)));
        total = reinterpret_cast<float *>(take(all * head_dim * sizeof(float)));
        tile_most = reinterpret_cast<float *>(take(r * sizeof(float)));
        tile_sum = reinterpret_cast<float *>(take(r * sizeof(float)));
        most = reinterpret_cast<float *>(take(all * sizeof(float)));
        sum = reinterpret_cast<float *>(take(all * sizeof(float)));
        tail = reinterpret_cast<uint16_t *>(take(static_cast<size_t>(kLane) * head_dim * 2));
    }

    A *queries;                   // [head][row][head_dim]
    float *scores;                // [row][kTile]
    A *weights;                   // [row][kTile]
    float *mixed;                 // [row][head_dim]: o_t
    float *total;                 // [head][row][head_dim]: o
    float *tile_most, *tile_sum;  // [row]: m_t, l_t
    float *most, *sum;            // [head][row]: m, l
    uint16_t *tail;               // values of the last, partly filled 16 positions of a head; the rest zero
};

// Softmax of columns [low, high) of a row of scores, zero in the rest of [first, end). Returns m_t and l_t.
template <class L>
void soften(float *scores, typename L::Activation *weights, int first, int end, int low, int high, float &most,
            float &sum) {
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
        L::narrow(weights + i, weight);
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

// Where keys and values of a tile's head lie.
struct TileHead {
    const Span *span;
    int base, kv_head;
};

template <class L>
class PieceAttention {
    using A = typename L::Activation;
    using V = typename L::Vector;

   public:
    PieceAttention(const Attention &job, const Piece &piece, void *memory)
        : job_(job),
          piece_(piece),
          span_(*piece.span),
          group_(job.heads / job.kv_heads),
          rows_(span_.count * group_),
          head_size_(static_cast<size_t>(job.block_size) * job.head_dim),
          scratch_(memory, rows_, piece.head_count, job.head_dim) {}

    // `next` is the piece that is likely to come next, or null.
    void run(const Piece *next) {
        gather_queries();
        for (int tile = piece_.first_tile; tile < piece_.end_tile; ++tile)
            for (int head = 0; head < piece_.head_count; ++head) attend(tile, head, after(tile, head, next));
        if (piece_.parts) return;
        for (int i = 0; i < rows_ * piece_.head_count; ++i)
            finish_query<L>(scratch_.total + i * job_.head_dim, scratch_.sum[i], job_.head_dim,
                            row_of(job_.out, i / rows_, i % rows_));
    }

   private:
    static int max_of(int a, int b) { return a > b ? a : b; }
    static int min_of(int a, int b) { return a < b ? a : b; }

    TileHead after(int tile, int head, const Piece *next) const {
        if (head + 1 < piece_.head_count) return {&span_, tile * kTile, piece_.first_head + head + 1};
        if (tile + 1 < piece_.end_tile) return {&span_, (tile + 1) * kTile, piece_.first_head};
        if (next) return {next->span, next->first_tile * kTile, next->first_head};
        return {nullptr, 0, 0};
    }

    void attend(int tile, int head, const TileHead &next) {
        const TileHead here{&span_, tile * kTile, piece_.first_head + head};
        const int base = here.base, first_position = span_.context - span_.count;
        const int start = job_.window ? max_of(0, first_position + 1 - job_.window) : 0;
        const int first = max_of(start, base) / kLane * kLane - base;
        const int end = (min_of(span_.context, base + kTile) + kLane - 1) / kLane * kLane - base;
        score(here, next, head, first, end);
        float *most = scratch_.tile_most, *sum = scratch_.tile_sum, *mixed = scratch_.mixed;
        if (piece_.parts) {
            const PartialTile part(piece_.parts, tile - piece_.first_tile, here.kv_head, job_.kv_heads, rows_, job_.head_dim);
            most = part.most, sum = part.sum, mixed = part.mixed;
        }
        for (int row = 0; row < rows_; ++row) {
            const int position = first_position + row / group_;
            const int low = max_of(first, job_.window ? position + 1 - job_.window - base : 0);
            const int high = min_of(end, position + 1 - base);
            sum[row] = 0.0f;
            if (low < high)
                soften<L>(scratch_.scores + row * kTile, scratch_.weights + row * kTile, first, end, low, high,
                          most[row], sum[row]);
            else  // bits of zero are zero in float and in bf16
                __builtin_memset(scratch_.weights + row * kTile + first, 0, (end - first) * sizeof(A));
        }
        mix(here, next, first, end, mixed);
        if (piece_.parts) return;
        for (int row = 0; row < rows_; ++row) {
            const int at = head * rows_ + row;
            if (sum[row] != 0.0f)
                fold<L>(mixed + row * job_.head_dim, most[row], sum[row], job_.head_dim,
                        scratch_.total + at * job_.head_dim, scratch_.most[at], scratch_.sum[at]);
        }
    }

    // The panel of keys of 16 positions from `position` on; values lie `kv_heads` heads further.
    const uint16_t *keys(const TileHead &at, int position) const {
        const int64_t block = at.span->table[position / job_.block_size];
        return job_.layer_cache + block * job_.block_stride + at.kv_head * head_size_ +
               static_cast<size_t>(position % job_.block_size / kLane) * kLane * job_.head_dim;
    }

    const uint16_t *values(const TileHead &at, int position) const {
        return keys(at, position) + job_.kv_heads * head_size_;
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

    // A block's slots past the end hold what an earlier owner left, which may be NaN: zero times that is not zero.
    const uint16_t *copy_tail(const TileHead &here) {
        const int filled = span_.context % kLane;
        const uint16_t *from = values(here, span_.context - filled);
        for (int part = 0; part < job_.head_dim / kLane; ++part)
            for (int pair = 0; pair < kLane / 2; ++pair)
                for (int i = 0; i < 2 * kLane; ++i) {
                    const int at = (part * (kLane / 2) + pair) * 2 * kLane + i;
                    scratch_.tail[at] = 2 * pair + i % 2 < filled ? from[at] : 0;
                }
        return scratch_.tail;
    }

    void score(const TileHead &here, const TileHead &next, int head, int first, int end) {
        const A *queries = scratch_.queries + static_cast<ptrdiff_t>(head) * rows_ * job_.head_dim;
        const void *panels[4], *ahead[4];
        for (int column = first; column < end;) {
            const int count = panels_together<L>(rows_, (end - column) / kLane);
            for (int p = 0; p < count; ++p) {
                const int at = column + p * kLane;
                panels[p] = keys(here, here.base + at);
                ahead[p] = next.span && next.base + at < next.span->context ? keys(next, next.base + at) : panels[p];
            }
            multiply_rows<L, Bf16Reader<L>>(panels, count, 1, job_.head_dim / 2, queries, job_.head_dim, rows_,
                                            scratch_.scores + column, kTile, ahead);
            column += count * kLane;
        }
    }

    void mix(const TileHead &here, const TileHead &next, int first, int end, float *mixed) {
        const int segments = (end - first) / kLane, parts = job_.head_dim / kLane;
        const uint16_t *starts[kTile / kLane], *ahead[kTile / kLane];
        const void *panels[kTile / kLane * 4], *ahead_panels[kTile / kLane * 4];
        for (int s = 0; s < segments; ++s) {
            const int at = first + s * kLane;
            starts[s] = here.base + at + kLane > span_.context ? copy_tail(here) : values(here, here.base + at);
            ahead[s] = next.span && next.base + at < next.span->context ? values(next, next.base + at) : starts[s];
        }
        for (int part = 0; part < parts;) {
            const int count = panels_together<L>(rows_, parts - part);
            for (int s = 0; s < segments; ++s)
                for (int p = 0; p < count; ++p) {
                    panels[s * count + p] = starts[s] + (part + p) * kLane * kLane;
                    ahead_panels[s * count + p] = ahead[s] + (part + p) * kLane * kLane;
                }
            multiply_rows<L, Bf16Reader<L>>(panels, count, segments, kLane / 2, scratch_.weights + first, kTile, rows_,
                                            mixed + part * kLane, job_.head_dim, ahead_panels);
            part += count;
        }
    }

    const Attention &job_;
    const Piece &piece_;
    const Span &span_;
    const int group_, rows_;
    const size_t head_size_;
    AttentionScratch<L> scratch_;
};

template <class L>
void attend(const Attention &job, const Piece &piece, const Piece *next, void *scratch) {
    PieceAttention<L>(job, piece, scratch).run(next);
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
