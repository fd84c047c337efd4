// How the cache holds keys and values, and how they come there. Included by each variant.
//
// A head of a block, of keys or of values, is a row of runs of 16 positions. A run is a panel (see panels.h), with the
// scales of its positions before it where there are any:
//
//     kBf16    keys      [head_dim / 2][16 positions][2 elements] bf16
//              values    [head_dim / 16][8][16 elements][2 positions] bf16
//
//     kInt8    scales    [16 positions] float                                     64 bytes, one line
//              keys      [head_dim / 2][2 elements][16 positions] signed bytes
//              values    [head_dim / 16][8][2 positions][16 elements] signed bytes
//
//     one (block, layer, keys or values, head) of kInt8 with 32 positions and 64 elements:
//
//     | 16 scales | 32 x 2 x 16 bytes | 16 scales | 32 x 2 x 16 bytes |
//     0           64                  1088        1152               2176
//
// so every panel begins at a multiple of 64 bytes. In kInt8 an element is scale * byte. A scale is the largest magnitude
// of the head's vector of that position, divided by 127. It is that position's alone, so it factors out: of a score (the
// dot product with a key) and of the weight of a value. No inner loop sees it.

// Of kBf16.
template <class L>
struct Bf16Cache {
    using Element = uint16_t;
    using Reader = Bf16Reader<L>;
    static constexpr CacheFormat kFormat = CacheFormat::kBf16;
    static constexpr int kPanel = 0;  // bytes of a run before its panel

    // Where in the row of a panel.
    static constexpr int place(int output, int odd) { return 2 * output + odd; }

    static float narrow(const float *head, int head_dim, Element *out) {
        for (int i = 0; i < head_dim; i += L::kCount) L::narrow_bf16(out + i, L::load(head + i));
        return 1.0f;
    }
};

// Of kInt8.
template <class L>
struct Int8Cache {
    using Element = int8_t;
    using Reader = ByteReader<L>;
    static constexpr CacheFormat kFormat = CacheFormat::kInt8;
    static constexpr int kPanel = kScaleBytes;

    static constexpr int place(int output, int odd) { return odd * kLane + output; }

    // To nearest, ties to even. Returns the scale: 0 if all are zero, NaN if one is not finite, so that what is computed
    // from this head is not finite either and is found out.
    static float narrow(const float *head, int head_dim, Element *out) {
        using V = typename L::Vector;
        V most = L::set(0.0f), zeros = L::set(0.0f);
        for (int i = 0; i < head_dim; i += L::kCount) {
            const V value = L::load(head + i);
            most = L::max(most, L::max(value, L::set(0.0f) - value));
            zeros = L::fma(value, L::set(0.0f), zeros);
        }
        const float scale = largest<L>(most) / 127.0f + total<L>(zeros);
        if (!(scale > 0.0f)) {
            __builtin_memset(out, 0, head_dim);
            return scale;
        }
        alignas(64) float quants[kHeadLimit];
        for (int i = 0; i < head_dim; i += L::kCount) {
            const V quant = L::round(L::load(head + i) / L::set(scale));
            // Only a scale among the smallest of all floats is so coarse that there is anything to cut off.
            L::store(quants + i, L::max(L::set(-127.0f), L::min(L::set(127.0f), quant)));
        }
        for (int i = 0; i < head_dim; ++i) out[i] = static_cast<int8_t>(quants[i]);
        return scale;
    }
};

// Writes keys or values of one head at position `slot` of a run.
template <class L, class Cache, bool Keys>
void put_head(const float *head, int head_dim, int slot, char *run) {
    alignas(64) typename Cache::Element narrow[kHeadLimit];
    const float scale = Cache::narrow(head, head_dim, narrow);
    if constexpr (Cache::kPanel > 0) reinterpret_cast<float *>(run)[slot] = scale;
    auto *panel = reinterpret_cast<typename Cache::Element *>(run + Cache::kPanel);
    for (int i = 0; i < head_dim; ++i) {
        const int row = Keys ? i / 2 : i / kLane * (kLane / 2) + slot / 2;
        panel[row * 2 * kLane + (Keys ? Cache::place(slot, i % 2) : Cache::place(i % kLane, slot % 2))] = narrow[i];
    }
}

template <class L, class Cache>
void rotate_into(const Rotation &job, int first_row, int end_row) {
    using A = typename L::Activation;
    const int head_dim = job.head_dim;
    const size_t run = run_bytes(Cache::kFormat, head_dim), head_size = job.block_size / kLane * run;
    alignas(64) float turned[kHeadLimit];
    for (int row = first_row; row < end_row; ++row) {
        const float *heads = job.qkv + static_cast<ptrdiff_t>(row) * job.qkv_stride;
        const float *cosines = job.cosines + job.positions[row] * (head_dim / 2);
        const float *sines = job.sines + job.positions[row] * (head_dim / 2);
        A *query = static_cast<A *>(job.queries) + static_cast<ptrdiff_t>(row) * job.heads * head_dim;
        for (int head = 0; head < job.heads; ++head, heads += head_dim, query += head_dim) {
            turn<L>(heads, job.q_norm, cosines, sines, job.eps, head_dim, job.scale, turned);
            for (int i = 0; i < head_dim; i += L::kCount) L::narrow(query + i, L::load(turned + i));
        }
        const int64_t block = job.slots[row] / job.block_size, offset = job.slots[row] % job.block_size;
        char *keys = job.layer_cache + block * job.block_stride + offset / kLane * run;
        char *values = keys + job.kv_heads * head_size;
        const int slot = offset % kLane;
        for (int head = 0; head < job.kv_heads; ++head, heads += head_dim, keys += head_size) {
            turn<L>(heads, job.k_norm, cosines, sines, job.eps, head_dim, 1.0f, turned);
            put_head<L, Cache, true>(turned, head_dim, slot, keys);
        }
        for (int head = 0; head < job.kv_heads; ++head, heads += head_dim, values += head_size)
            put_head<L, Cache, false>(heads, head_dim, slot, values);
    }
}

template <class L>
void rotate(const Rotation &job, int first_row, int end_row) {
    if (job.format == CacheFormat::kBf16)
        rotate_into<L, Bf16Cache<L>>(job, first_row, end_row);
    else
        rotate_into<L, Int8Cache<L>>(job, first_row, end_row);
}
