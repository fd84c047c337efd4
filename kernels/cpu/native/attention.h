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

template <class L>
struct AttentionScratch {
    using A = typename L::Activation;

    static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

    static size_t bytes(int rows, int head_dim) {
        const size_t r = static_cast<size_t>(rows);
        return rounded(r * head_dim * sizeof(A)) + rounded(r * kTile * sizeof(float)) +
               rounded(r * kTile * sizeof(A)) + 2 * rounded(r * head_dim * sizeof(float)) +
               2 * rounded(r * sizeof(float)) + rounded(static_cast<size_t>(kLane) * head_dim * 2);
    }

    AttentionScratch(void *memory, int rows, int head_dim) {
        auto *next = static_cast<char *>(memory);
        const auto take = [&next](size_t size) {
            char *part = next;
            next += rounded(size);
            return part;
        };
        const size_t r = static_cast<size_t>(rows);
        queries = reinterpret_cast<A *>(take(r * head_dim * sizeof(A)));
        scores = reinterpret_cast<float *>(take(r * kTile * sizeof(float)));
        weights = reinterpret_cast<A *>(take(r * kTile * sizeof(A)));
        mixed = reinterpret_cast<float *>(take(r * head_dim * sizeof(float)));
        total = reinterpret_cast<float *>(take(r * head_dim * sizeof(float)));
        most = reinterpret_cast<float *>(take(r * sizeof(float)));
        sum = reinterpret_cast<float *>(take(r * sizeof(float)));
        tail = reinterpret_cast<uint16_t *>(take(static_cast<size_t>(kLane) * head_dim * 2));
    }

    A *queries;      // [row][head_dim]
    float *scores;   // [row][kTile]
    A *weights;      // [row][kTile]
    float *mixed;    // [row][head_dim]: o_t
    float *total;    // [row][head_dim]: o
    float *most;     // [row]: m
    float *sum;      // [row]: l
    uint16_t *tail;  // values of the last, partly filled 16 positions; the rest zero
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

template <class L>
class SpanAttention {
    using A = typename L::Activation;
    using V = typename L::Vector;

   public:
    SpanAttention(const Attention &job, const Span &span, int kv_head, void *memory)
        : job_(job),
          span_(span),
          group_(job.heads / job.kv_heads),
          rows_(span.count * group_),
          kv_head_(kv_head),
          head_size_(static_cast<size_t>(job.block_size) * job.head_dim),
          scratch_(memory, rows_, job.head_dim) {}

    void run() {
        const int first_position = span_.context - span_.count;
        const int start = job_.window ? max_of(0, first_position + 1 - job_.window) : 0;
        gather_queries();
        copy_tail();
        for (int base = start / kTile * kTile; base < span_.context; base += kTile) {
            const int first = max_of(start, base) / kLane * kLane - base;
            const int end = (min_of(span_.context, base + kTile) + kLane - 1) / kLane * kLane - base;
            score(base, first, end);
            float most[kGroupLimit], sum[kGroupLimit];
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
            mix(base, first, end);
            for (int row = 0; row < rows_; ++row)
                if (sum[row] != 0.0f) fold(row, most[row], sum[row]);
        }
        scatter();
    }

   private:
    static int max_of(int a, int b) { return a > b ? a : b; }
    static int min_of(int a, int b) { return a < b ? a : b; }

    // The panel of keys of 16 positions from `position` on; values lie `kv_heads` heads further.
    const uint16_t *keys(int position) const {
        const int64_t block = span_.table[position / job_.block_size];
        return job_.layer_cache + block * job_.block_stride + kv_head_ * head_size_ +
               static_cast<size_t>(position % job_.block_size / kLane) * kLane * job_.head_dim;
    }

    const uint16_t *values(int position) const { return keys(position) + job_.kv_heads * head_size_; }

    A *row_of(const void *rows, int row) const {
        const ptrdiff_t stride = static_cast<ptrdiff_t>(job_.heads) * job_.head_dim;
        return static_cast<A *>(const_cast<void *>(rows)) + (span_.first_row + row / group_) * stride +
               (kv_head_ * group_ + row % group_) * job_.head_dim;
    }

    void gather_queries() {
        for (int row = 0; row < rows_; ++row) {
            __builtin_memcpy(scratch_.queries + row * job_.head_dim, row_of(job_.queries, row),
                             job_.head_dim * sizeof(A));
            scratch_.most[row] = -__builtin_inff();
            scratch_.sum[row] = 0.0f;
            for (int i = 0; i < job_.head_dim; ++i) scratch_.total[row * job_.head_dim + i] = 0.0f;
        }
    }

    // A block's slots past the end hold what an earlier owner left, which may be NaN: zero times that is not zero.
    void copy_tail() {
        const int filled = span_.context % kLane;
        if (!filled) return;
        const uint16_t *from = values(span_.context - filled);
        for (int part = 0; part < job_.head_dim / kLane; ++part)
            for (int pair = 0; pair < kLane / 2; ++pair)
                for (int i = 0; i < 2 * kLane; ++i) {
                    const int at = (part * (kLane / 2) + pair) * 2 * kLane + i;
                    scratch_.tail[at] = 2 * pair + i % 2 < filled ? from[at] : 0;
                }
    }

    // Asks for 16 positions of keys or values: tables lead anywhere, which no processor can guess.
    void prefetch(const uint16_t *panel) const {
        const auto *line = reinterpret_cast<const char *>(panel);
        for (int byte = 0; byte < kLane * job_.head_dim * 2; byte += 64) __builtin_prefetch(line + byte, 0, 2);
    }

    // Scores 16 positions after the other. The keys four steps ahead are asked for line by line meanwhile, the values of
    // these positions at once: they are needed when the tile is scored.
    void score(int base, int first, int end) {
        for (int column = first; column < end; column += kLane) {
            const int position = base + column, later = position + 4 * kLane;
            prefetch(values(position));
            const void *panel = keys(position);
            const auto *next = later < span_.context ? reinterpret_cast<const char *>(keys(later)) : nullptr;
            multiply_rows<L, Bf16Reader<L>>(&panel, 1, 1, job_.head_dim / 2, scratch_.queries, job_.head_dim, rows_,
                                            scratch_.scores + column, kTile, next);
        }
    }

    void mix(int base, int first, int end) {
        const int segments = (end - first) / kLane, parts = job_.head_dim / kLane;
        const int together = in_pairs<L>(rows_) ? 2 : 1;
        const uint16_t *starts[kTile / kLane];
        const void *panels[kTile / kLane * 2];
        for (int s = 0; s < segments; ++s) {
            const int position = base + first + s * kLane;
            starts[s] = position + kLane > span_.context ? scratch_.tail : values(position);
        }
        for (int part = 0; part < parts;) {
            const int count = min_of(together, parts - part);
            for (int s = 0; s < segments; ++s)
                for (int p = 0; p < count; ++p) panels[s * count + p] = starts[s] + (part + p) * kLane * kLane;
            multiply_rows<L, Bf16Reader<L>>(panels, count, segments, kLane / 2, scratch_.weights + first, kTile, rows_,
                             scratch_.mixed + part * kLane, job_.head_dim);
            part += count;
        }
    }

    void fold(int row, float most, float sum) {
        float &old_most = scratch_.most[row];
        const float new_most = old_most > most ? old_most : most;
        const V keep = exponential<L>(L::set(old_most - new_most)), add = exponential<L>(L::set(most - new_most));
        float *total = scratch_.total + row * job_.head_dim;
        const float *mixed = scratch_.mixed + row * job_.head_dim;
        for (int i = 0; i < job_.head_dim; i += L::kCount)
            L::store(total + i, L::fma(L::load(mixed + i), add, L::load(total + i) * keep));
        alignas(64) float sums[L::kCount];
        L::store(sums, L::fma(L::set(sum), add, L::set(scratch_.sum[row]) * keep));
        scratch_.sum[row] = sums[0];
        old_most = new_most;
    }

    void scatter() {
        for (int row = 0; row < rows_; ++row) {
            A *out = row_of(job_.out, row);
            const V scale = L::set(1.0f / scratch_.sum[row]);
            for (int i = 0; i < job_.head_dim; i += L::kCount)
                L::narrow(out + i, L::load(scratch_.total + row * job_.head_dim + i) * scale);
        }
    }

    const Attention &job_;
    const Span &span_;
    const int group_, rows_, kv_head_;
    const size_t head_size_;
    AttentionScratch<L> scratch_;
};

template <class L>
void attend(const Attention &job, const Span &span, int kv_head, void *scratch) {
    SpanAttention<L>(job, span, kv_head, scratch).run();
}
