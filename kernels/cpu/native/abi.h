// What Python hands over: plain structures of pointers, mirrored field for field in kernels/cpu/library.py.
#pragma once
#include <cstdint>

extern "C" {

// A matrix as panels, in one of the formats of formats.h.
struct QuireMatrix {
    const void *panels;
    int64_t format;
};

// One layer. A null pointer stands for what a model does not have.
struct QuireLayer {
    QuireMatrix qkv, output, gate_up, down;
    const float *input_norm, *mlp_norm, *q_norm, *k_norm;
    const float *qkv_bias, *output_bias;
};

// A decoder. Everything that it points at belongs to the caller and outlives the runner.
struct QuireModel {
    int32_t hidden, inner, heads, kv_heads, head_dim, layer_count, vocab, block_size, window;
    int32_t cache_format;  // one of CacheFormat
    float eps;
    const QuireLayer *layers;
    QuireMatrix embeddings;  // in bf16 not panels, but rows [vocab][hidden]
    QuireMatrix head;
    const float *final_norm;
    const float *cosines, *sines;  // [position][head_dim / 2]
};

// One step, as execsvc.batch.Batch has it.
struct QuireBatch {
    int32_t token_count, sequence_count, sampled_count, table_stride;
    const int64_t *tokens, *positions, *slots;  // [token]
    const int32_t *tables;                      // [sequence][table_stride]
    const int64_t *context_lens;                // [sequence], this step's tokens included
    const int64_t *query_starts;                // [sequence + 1]
    const int64_t *sampled_rows;                // [sampled]
    void *cache;                                // written: keys and values of the step's tokens
    float *logits;                              // written: [sampled][vocab rounded up to 32]
    int64_t *best;                              // written: [sampled], the likeliest token, -1 if logits are not finite
};
}
