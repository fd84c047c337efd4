// The kernels of one instruction set, as a table: what the step calls without knowing which set it is.
//
// "Rows" of activations are in the variant's own element type: float, or bf16 where the processor multiplies that.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quire {

constexpr int kLane = 16;       // outputs of a panel
constexpr int kPair = 32;       // outputs of two panels: what a product is divided into
constexpr int kTile = 256;      // positions that share a maximum in the softmax; a fixed grid from position 0
constexpr int kUnitBytes = 128 * 1024;  // of keys, or values, read in one go: two fit into the second-level cache

enum class Epilogue { kStore, kAdd, kSwiGLU };

// How a matrix is stored: see formats.h.
enum class Format { kBf16, kFourBits, kEightBits, kEightBitsOf16 };

// How the cache holds keys and values: see cache.h.
enum class CacheFormat { kBf16, kInt8 };

// Bytes of 16 positions of a head. Of one linkage with each file that includes this: see kernels.h.
static constexpr size_t run_bytes(CacheFormat format, int head_dim) {
    const size_t elements = static_cast<size_t>(kLane) * head_dim;
    return format == CacheFormat::kBf16 ? elements * sizeof(uint16_t) : elements + kLane * sizeof(float);
}

// rows [row][2 * pairs] times the transpose of a weight in panels.
struct Product {
    const void *panels;
    Format format;
    int pairs;
    const void *rows;
    int row_stride;
    Epilogue epilogue;
    const float *bias;  // [output], or null
    float *out;         // kStore: written; kAdd: added to
    void *activations;  // kSwiGLU: silu(even panel) * odd panel, as rows
    int out_stride;
    // Two panels that are likely to be multiplied after the last ones, or null.
    const void *next;
};

// Normalises heads, rotates them, and writes keys and values into the cache.
struct Rotation {
    const float *qkv;  // [row][q heads, k heads, v heads]
    int qkv_stride;
    void *queries;  // written: [row][heads * head_dim], multiplied by `scale`
    const int64_t *positions, *slots;
    const float *cosines, *sines, *q_norm, *k_norm;
    CacheFormat format;
    char *layer_cache;    // the layer's part of block 0
    size_t block_stride;  // bytes
    int heads, kv_heads, head_dim, block_size;
    float eps, scale;
};

struct Attention {
    const void *queries;  // [row][heads * head_dim]
    void *out;            // written, like queries
    CacheFormat format;
    const char *layer_cache;
    size_t block_stride;
    int heads, kv_heads, head_dim, block_size, window;
};

// Consecutive queries of one sequence.
struct Span {
    const int32_t *table;
    int first_row, count;
    int context;  // positions up to the last query, itself included
};

// What one thread attends to at a time: some key/value heads of a span, in some of its tiles.
struct Piece {
    const Span *span;
    int first_head, head_count;
    int first_tile, end_tile;
    float *parts;  // null if these are all tiles; else written: [tile][head of the model], see PartialTile
};

// What a variant's `Tiles` say: see tiles.h. Without them:
struct NoTiles {
    static constexpr int kRows = 0, kQueryRows = 24, kProductRows = 96, kProductBytes = 192 * 1024;
};

// With them there are more rows together: products are as fast as what feeds them, and such processors have more cache.
struct SomeTiles {
    static constexpr int kRows = 16, kQueryRows = 96, kProductRows = 256, kProductBytes = 1024 * 1024;
};

struct Variant {
    const char *name;
    int activation_bytes;
    int query_rows;    // rows (queries x heads of a group) that attend together, unless a group is larger
    int product_rows;  // most rows of a product in one go
    int product_bytes;  // most bytes that those should have: they stay in the second-level cache
    // out [row][size] = rows of `in`, normalised to root mean square 1, times weight.
    void (*norm)(const float *in, const float *weight, float eps, int size, void *out);
    void (*embed)(const uint16_t *row, int size, float *out);
    // The same from row `index` of a matrix in panels.
    void (*embed_panels)(const void *panels, Format format, int64_t index, int size, float *out);
    // Bytes of a panel of that many inputs.
    size_t (*panel_bytes)(Format format, int inputs);
    // Bytes that `product` needs for a matrix of that many inputs.
    size_t (*product_scratch)(int inputs);
    void (*product)(const Product &, int first_row, int end_row, int first_pair, int end_pair, void *scratch);
    void (*rotate)(const Rotation &, int first_row, int end_row);
    // Bytes that `attend` needs for so many rows on each of so many key/value heads.
    size_t (*attention_scratch)(int rows, int heads, int head_dim);
    // `next`, which may be null, is the piece that this thread is likely to do next.
    void (*attend)(const Attention &, const Piece &, const Piece *next, void *scratch);
    // Adds up the parts that pieces of a span have left; the given piece is all of the span.
    void (*merge)(const Attention &, const Piece &);
    // Index of the largest of `size` values, the first if there are several; -1 if one is not finite.
    int64_t (*best)(const float *values, int size);
};

}  // namespace quire
