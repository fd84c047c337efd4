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
    for (int width = L::kCount / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] = parts[i] > parts[i + width] ? parts[i] : parts[i + width];
    return parts[0];
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
