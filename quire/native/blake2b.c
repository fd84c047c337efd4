#include "blake2b.h"

#include <string.h>

enum { BLOCK_BYTES = 128, LINK_BYTES = 64 };

typedef struct {
    uint64_t h[8];
    uint64_t hashed;
    size_t filled;
    uint8_t block[BLOCK_BYTES];
} State;

static const uint64_t START[8] = {
    UINT64_C(0x6a09e667f3bcc908), UINT64_C(0xbb67ae8584caa73b), UINT64_C(0x3c6ef372fe94f82b),
    UINT64_C(0xa54ff53a5f1d36f1), UINT64_C(0x510e527fade682d1), UINT64_C(0x9b05688c2b3e6c1f),
    UINT64_C(0x1f83d9abfb41bd6b), UINT64_C(0x5be0cd19137e2179),
};

static inline uint64_t load(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

static inline void store(uint8_t *bytes, uint64_t word) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    memcpy(bytes, &word, sizeof word);
}

static inline uint64_t rotate(uint64_t word, int bits) {
    return word >> bits | word << (64 - bits);
}

#define MIX(a, b, c, d, x, y)                                                                                          \
    do {                                                                                                               \
        a += b + (x);                                                                                                  \
        d = rotate(d ^ a, 32);                                                                                         \
        c += d;                                                                                                        \
        b = rotate(b ^ c, 24);                                                                                         \
        a += b + (y);                                                                                                  \
        d = rotate(d ^ a, 16);                                                                                         \
        c += d;                                                                                                        \
        b = rotate(b ^ c, 63);                                                                                         \
    } while (0)

/* The order of the message words is written out: a table of it would cost a load for each. */
#define ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, sa, sb, sc, sd, se, sf)                                          \
    do {                                                                                                               \
        MIX(v0, v4, v8, vc, m[s0], m[s1]);                                                                             \
        MIX(v1, v5, v9, vd, m[s2], m[s3]);                                                                             \
        MIX(v2, v6, va, ve, m[s4], m[s5]);                                                                             \
        MIX(v3, v7, vb, vf, m[s6], m[s7]);                                                                             \
        MIX(v0, v5, va, vf, m[s8], m[s9]);                                                                             \
        MIX(v1, v6, vb, vc, m[sa], m[sb]);                                                                             \
        MIX(v2, v7, v8, vd, m[sc], m[sd]);                                                                             \
        MIX(v3, v4, v9, ve, m[se], m[sf]);                                                                             \
    } while (0)

/* Inlined where it is called, so that words which are known to be zero there cost nothing. */
static inline __attribute__((always_inline)) void mix(uint64_t h[8], const uint64_t m[16], uint64_t hashed,
                                                      uint64_t last) {
    uint64_t v0 = h[0], v1 = h[1], v2 = h[2], v3 = h[3], v4 = h[4], v5 = h[5], v6 = h[6], v7 = h[7];
    uint64_t v8 = START[0], v9 = START[1], va = START[2], vb = START[3];
    uint64_t vc = START[4] ^ hashed, vd = START[5], ve = START[6] ^ last, vf = START[7];
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
    ROUND(11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4);
    ROUND(7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8);
    ROUND(9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13);
    ROUND(2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9);
    ROUND(12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11);
    ROUND(13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10);
    ROUND(6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5);
    ROUND(10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0);
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
    h[0] ^= v0 ^ v8;
    h[1] ^= v1 ^ v9;
    h[2] ^= v2 ^ va;
    h[3] ^= v3 ^ vb;
    h[4] ^= v4 ^ vc;
    h[5] ^= v5 ^ vd;
    h[6] ^= v6 ^ ve;
    h[7] ^= v7 ^ vf;
}

static void compress(State *state, uint64_t last) {
    uint64_t m[16];
    for (int i = 0; i < 16; i++) {
        m[i] = load(state->block + 8 * i);
    }
    mix(state->h, m, state->hashed, last);
}

/* A full block is compressed only when more bytes come: the last one is marked as such. */
static void update(State *state, const uint8_t *bytes, size_t count) {
    while (count) {
        if (state->filled == BLOCK_BYTES) {
            state->hashed += BLOCK_BYTES;
            compress(state, 0);
            state->filled = 0;
        }
        size_t taken = BLOCK_BYTES - state->filled;
        if (taken > count) {
            taken = count;
        }
        memcpy(state->block + state->filled, bytes, taken);
        state->filled += taken;
        bytes += taken;
        count -= taken;
    }
}

static void begin(uint64_t h[8]) {
    memcpy(h, START, sizeof START);
    /* The parameter block: digest length, no key, fan-out and depth 1. */
    h[0] ^= UINT64_C(0x01010000) ^ DIGEST_BYTES;
}

/* A digest and 16 token ids: what nearly every call is for. It fits one block, of which the last 6 words are zero. */
static void link(uint8_t out[DIGEST_BYTES], const uint8_t *head, const uint8_t *tail) {
    uint64_t h[8], m[16] = {load(head), load(head + 8)};
    for (int i = 0; i < LINK_BYTES / 8; i++) {
        m[2 + i] = load(tail + 8 * i);
    }
    begin(h);
    mix(h, m, DIGEST_BYTES + LINK_BYTES, ~UINT64_C(0));
    store(out, h[0]);
    store(out + 8, h[1]);
}

void blake2b_pair(uint8_t out[DIGEST_BYTES], const uint8_t *head, size_t head_bytes, const uint8_t *tail,
                  size_t tail_bytes) {
    if (head_bytes == DIGEST_BYTES && tail_bytes == LINK_BYTES) {
        link(out, head, tail);
        return;
    }
    State state;
    begin(state.h);
    state.hashed = 0;
    state.filled = 0;
    update(&state, head, head_bytes);
    update(&state, tail, tail_bytes);
    state.hashed += state.filled;
    memset(state.block + state.filled, 0, BLOCK_BYTES - state.filled);
    compress(&state, ~UINT64_C(0));
    store(out, state.h[0]);
    store(out + 8, state.h[1]);
}
