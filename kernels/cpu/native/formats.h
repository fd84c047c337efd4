// Formats of panels (see panels.h). Included by each variant.
//
//     kBf16         [input / 2][16][2] bf16
//     kFourBits     for each 32 inputs: 16 scales, 16 offsets (float), then [16][16] bytes:
//                   low half the even input of a pair, high half the odd one;   weight = scale * quant + offset
//     kEightBits    for each 32 inputs: 16 scales (float), then [16][2][16] signed bytes;   weight = scale * quant
//     kEightBitsOf16    the same for each 16 inputs
//
// Scales and offsets are halves, or halves times few bits, so a weight is rounded once, as when a file is dequantised to
// float: scale * quant is exact where an offset is added. A reader hands out the weights of one pair of inputs after the other, in groups of kGroup pairs.

constexpr int kGroupInputs = 32;
constexpr int kDecodedTogether = 2;  // pairs, where there are no groups: a line of bytes
constexpr int kScaleBytes = kLane * static_cast<int>(sizeof(float));

template <class L>
struct Bf16Reader {
    static constexpr int kGroup = 0;  // no groups
    static constexpr int kPairBytes = 2 * kLane * static_cast<int>(sizeof(uint16_t));
    static constexpr size_t bytes(int pairs) { return static_cast<size_t>(pairs) * kPairBytes; }

    const uint16_t *at;

    void start(const void *panel) { at = static_cast<const uint16_t *>(panel); }
    void open() {}
    typename L::Operand weights(int v, int half) const { return L::weights(at + v * L::kCount * 2, half); }
    void next() { at += 2 * kLane; }
};

// [input][16] float: what a panel of a variant with float activations is decoded to.
template <class L>
struct FloatReader {
    static constexpr int kGroup = 0;
    static constexpr int kPairBytes = 2 * kLane * static_cast<int>(sizeof(float));
    static constexpr size_t bytes(int pairs) { return static_cast<size_t>(pairs) * kPairBytes; }

    const float *at;

    void start(const void *panel) { at = static_cast<const float *>(panel); }
    void open() {}
    typename L::Operand weights(int v, int half) const { return L::load(at + half * kLane + v * L::kCount); }
    void next() { at += 2 * kLane; }
};

// [input / 2][2][16] signed bytes as they are, for whoever applies scales before or after. bf16 holds them exactly, too.
template <class L>
struct ByteReader {
    static constexpr int kGroup = 0;  // no groups
    static constexpr int kPairBytes = 2 * kLane;
    static constexpr int kGroupBytes = kDecodedTogether * kPairBytes;
    static constexpr size_t bytes(int pairs) { return static_cast<size_t>(pairs) * kPairBytes; }

    const int8_t *at;

    void start(const void *panel) { at = static_cast<const int8_t *>(panel); }
    void open() {}
    typename L::Vector weight(int v, int odd) const { return L::signed_bytes(at + odd * kLane + v * L::kCount); }
    typename L::Operand weights(int v, int half) const { return L::operand(weight(v, 0), weight(v, 1), half); }
    void next() { at += kPairBytes; }
};

template <class L>
struct FourBitReader {
    static constexpr int kGroup = kGroupInputs / 2;
    static constexpr int kPairBytes = kLane;
    static constexpr int kGroupBytes = 2 * kScaleBytes + kGroup * kPairBytes;
    static constexpr size_t bytes(int pairs) { return static_cast<size_t>(pairs / kGroup) * kGroupBytes; }

    const uint8_t *at;
    typename L::Vector scale[kLane / L::kCount], offset[kLane / L::kCount];

    void start(const void *panel) { at = static_cast<const uint8_t *>(panel); }
    void open() {
        const float *scales = reinterpret_cast<const float *>(at);
#pragma GCC unroll 4
        for (int v = 0; v < kLane / L::kCount; ++v) {
            scale[v] = L::load(scales + v * L::kCount);
            offset[v] = L::load(scales + kLane + v * L::kCount);
        }
        at += 2 * kScaleBytes;
    }
    typename L::Vector weight(int v, int odd) const {
        return L::fma(scale[v], L::nibbles(at + v * L::kCount, odd), offset[v]);
    }
    typename L::Operand weights(int v, int half) const { return L::operand(weight(v, 0), weight(v, 1), half); }
    void next() { at += kPairBytes; }
};

template <class L, int Inputs>
struct EightBitReader {
    static constexpr int kGroup = Inputs / 2;
    static constexpr int kPairBytes = 2 * kLane;
    static constexpr int kGroupBytes = kScaleBytes + kGroup * kPairBytes;
    static constexpr size_t bytes(int pairs) { return static_cast<size_t>(pairs / kGroup) * kGroupBytes; }

    const uint8_t *at;
    typename L::Vector scale[kLane / L::kCount];

    void start(const void *panel) { at = static_cast<const uint8_t *>(panel); }
    void open() {
#pragma GCC unroll 4
        for (int v = 0; v < kLane / L::kCount; ++v)
            scale[v] = L::load(reinterpret_cast<const float *>(at) + v * L::kCount);
        at += kScaleBytes;
    }
    typename L::Vector weight(int v, int odd) const {
        return scale[v] * L::signed_bytes(reinterpret_cast<const int8_t *>(at) + odd * kLane + v * L::kCount);
    }
    typename L::Operand weights(int v, int half) const { return L::operand(weight(v, 0), weight(v, 1), half); }
    void next() { at += kPairBytes; }
};

// Writes a panel as L::Decoded reads it, and asks for the panel `next` meanwhile.
template <class L, class Reader>
void decode(const void *panel, int pairs, void *out, const void *next) {
    Reader reader;
    reader.start(panel);
    constexpr int kTogether = Reader::kGroup ? Reader::kGroup : kDecodedTogether;
    const auto *ahead = static_cast<const char *>(next);
    auto *to = static_cast<typename L::Activation *>(out);
    for (int pair = 0; pair < pairs; ++pair, to += 2 * kLane) {
        if (pair % kTogether == 0) {
            reader.open();
            for (int i = 0; i < Reader::kGroupBytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
            ahead += Reader::kGroupBytes;
        }
        for (int v = 0; v < kLane / L::kCount; ++v) L::put_pair(to, v, reader.weight(v, 0), reader.weight(v, 1));
        reader.next();
    }
}

// Decodes panels to `to`, one after the other, and says where they are; `next` as many panels to ask for.
template <class L, class Reader>
void decode_panels(const void *const *panels, int count, int pairs, char *to, const void *const *next,
                   const void **decoded) {
    for (int i = 0; i < count; ++i, to += L::Decoded::bytes(pairs)) {
        decode<L, Reader>(panels[i], pairs, to, next[i]);
        decoded[i] = to;
    }
}

// One output's weights, in float.
template <class L, class Reader>
void embed_row(const void *panels, int64_t index, int size, float *out) {
    const size_t panel_bytes = Reader::bytes(size / 2);
    Reader reader;
    reader.start(static_cast<const char *>(panels) + index / kLane * panel_bytes);
    const int v = index % kLane / L::kCount, lane = index % L::kCount;
    alignas(64) float parts[L::kCount];
    for (int input = 0; input < size; input += 2) {
        if (input / 2 % Reader::kGroup == 0) reader.open();
        for (int odd = 0; odd < 2; ++odd) {
            L::store(parts, reader.weight(v, odd));
            out[input + odd] = parts[lane];
        }
        reader.next();
    }
}

template <class L>
void embed_panels(const void *panels, Format format, int64_t index, int size, float *out) {
    if (format == Format::kFourBits)
        embed_row<L, FourBitReader<L>>(panels, index, size, out);
    else if (format == Format::kEightBits)
        embed_row<L, EightBitReader<L, kGroupInputs>>(panels, index, size, out);
    else
        embed_row<L, EightBitReader<L, kGroupInputs / 2>>(panels, index, size, out);
}
