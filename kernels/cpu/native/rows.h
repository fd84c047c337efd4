// What is done to single rows. Included by each variant (see panels.h).

// e^x, relative error below 2e-7; exactly 0 below -87.3, exactly 1 at 0, NaN for NaN.
// Cody-Waite reduction to [-ln 2 / 2, ln 2 / 2], then the minimax polynomial of Cephes' expf.
template <class L>
typename L::Vector exponential(typename L::Vector x) {
    using V = typename L::Vector;
    const V lowest = L::set(-87.3f);
    const V clamped = L::min(L::set(88.3f), L::max(lowest, x));
    const V n = L::round(clamped * L::set(1.44269504088896341f));
    V r = L::fma(n, L::set(-0.693359375f), clamped);
    r = L::fma(n, L::set(2.12194440e-4f), r);
    V p = L::set(1.9875691500e-4f);
    p = L::fma(p, r, L::set(1.3981999507e-3f));
    p = L::fma(p, r, L::set(8.3334519073e-3f));
    p = L::fma(p, r, L::set(4.1665795894e-2f));
    p = L::fma(p, r, L::set(1.6666665459e-1f));
    p = L::fma(p, r, L::set(5.0000001201e-1f));
    p = L::fma(p, r * r, r) + L::set(1.0f);
    return L::zero_below(x, lowest, L::scale(p, n));
}

// Sum, or maximum, of a vector's elements, always in the same order.
template <class L>
float total(typename L::Vector v) {
    alignas(64) float parts[L::kCount];
    L::store(parts, v);
    for (int width = L::kCount / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
}

template <class L>
float largest(typename L::Vector v) {
    alignas(64) float parts[L::kCount];
    L::store(parts, v);
    float most = parts[0];
    for (int i = 1; i < L::kCount; ++i) most = parts[i] > most ? parts[i] : most;
    return most;
}

// 1 / root mean square.
template <class L>
float norm_scale(const float *in, float eps, int size) {
    typename L::Vector squares = L::set(0.0f);
    for (int i = 0; i < size; i += L::kCount) squares = L::fma(L::load(in + i), L::load(in + i), squares);
    return 1.0f / __builtin_sqrtf(total<L>(squares) / static_cast<float>(size) + eps);
}

template <class L>
void norm(const float *in, const float *weight, float eps, int size, void *out) {
    const typename L::Vector scale = L::set(norm_scale<L>(in, eps, size));
    auto *row = static_cast<typename L::Activation *>(out);
    for (int i = 0; i < size; i += L::kCount) L::narrow(row + i, L::load(in + i) * scale * L::load(weight + i));
}

template <class L>
void embed(const uint16_t *row, int size, float *out) {
    for (int i = 0; i < size; i += L::kCount) L::store(out + i, L::widen(row + i));
}

// out = `head`, normalised if there is a weight, with element i turned with element i + head_dim / 2.
template <class L>
void turn(const float *head, const float *weight, const float *cosines, const float *sines, float eps, int head_dim,
          float factor, float *out) {
    alignas(64) float normed[kHeadLimit];
    if (weight) {
        const typename L::Vector scale = L::set(norm_scale<L>(head, eps, head_dim));
        for (int i = 0; i < head_dim; i += L::kCount)
            L::store(normed + i, L::load(head + i) * scale * L::load(weight + i));
        head = normed;
    }
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        const float first = head[i], second = head[half + i];
        out[i] = (first * cosines[i] - second * sines[i]) * factor;
        out[half + i] = (second * cosines[i] + first * sines[i]) * factor;
    }
}

// Where the cache holds one head of one layer of a block, as panels (see panels.h), for each 16 positions of the block:
//
//     keys     [block_size / 16][head_dim / 2][16 positions][2 elements]
//     values   [block_size / 16][head_dim / 16][8][16 elements][2 positions]
template <class L>
void rotate(const Rotation &job, int first_row, int end_row) {
    using A = typename L::Activation;
    const int head_dim = job.head_dim;
    const size_t head_size = static_cast<size_t>(job.block_size) * head_dim;
    alignas(64) float turned[kHeadLimit];
    alignas(64) uint16_t narrow[kHeadLimit];
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
        uint16_t *keys = job.layer_cache + block * job.block_stride + offset / kLane * kLane * head_dim;
        uint16_t *values = keys + job.kv_heads * head_size;
        const int slot = offset % kLane;
        for (int head = 0; head < job.kv_heads; ++head, heads += head_dim, keys += head_size) {
            turn<L>(heads, job.k_norm, cosines, sines, job.eps, head_dim, 1.0f, turned);
            for (int i = 0; i < head_dim; i += L::kCount) L::narrow_bf16(narrow + i, L::load(turned + i));
            for (int i = 0; i < head_dim; ++i) keys[i / 2 * 2 * kLane + slot * 2 + i % 2] = narrow[i];
        }
        for (int head = 0; head < job.kv_heads; ++head, heads += head_dim, values += head_size) {
            for (int i = 0; i < head_dim; i += L::kCount) L::narrow_bf16(narrow + i, L::load(heads + i));
            for (int i = 0; i < head_dim; ++i)
                values[i / kLane * kLane * kLane + slot / 2 * 2 * kLane + i % kLane * 2 + slot % 2] = narrow[i];
        }
    }
}

template <class L>
int64_t best(const float *values, int size) {
    constexpr float kLargest = 3.4028234663852886e38f;
    int whole = size / L::kCount * L::kCount;
    // Zero times a number that is not finite is NaN, and NaN stays in a sum.
    typename L::Vector most = L::set(-kLargest), zeros = L::set(0.0f);
    for (int i = 0; i < whole; i += L::kCount) {
        const typename L::Vector value = L::load(values + i);
        most = L::max(value, most);
        zeros = L::fma(value, L::set(0.0f), zeros);
    }
    float top = largest<L>(most), sum = total<L>(zeros);
    for (int i = whole; i < size; ++i) {
        top = values[i] > top ? values[i] : top;
        sum += values[i] * 0.0f;
    }
    if (!(sum == 0.0f)) return -1;
    for (int i = 0; i < size; ++i)
        if (values[i] == top) return i;
    return -1;
}
