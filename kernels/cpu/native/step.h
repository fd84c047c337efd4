// One forward pass over a batch: a list of phases on a variant's kernels.
#pragma once
#include <mutex>
#include <vector>

#include "abi.h"
#include "phases.h"
#include "variant.h"

namespace quire {

// Memory that grows and is never given back before the end; contents are not kept when it grows.
class Scratch {
   public:
    ~Scratch();
    void reserve(size_t bytes);
    template <class T>
    T *as() const {
        return static_cast<T *>(memory_);
    }

   private:
    void *memory_ = nullptr;
    size_t size_ = 0;
};

// A model on a number of threads. Any number of them live side by side; steps of one run one after the other.
class Runner {
   public:
    Runner(const QuireModel &model, const Variant &variant, int thread_count);
    void step(const QuireBatch &batch);

   private:
    enum Stage { kEmbed, kInputNorm, kQkv, kRotate, kAttend, kMerge, kOutput, kMlpNorm, kGateUp, kDown, kFinalNorm, kHead, kBest, kStageCount };

    // How a product is cut: tiles of rows, and for each of them runs of panel pairs.
    struct Cut {
        int rows, inputs, tile_rows, tile_count, pairs, run_pairs, run_count;
    };

    void plan();
    void plan_spans();
    void plan_pieces();
    void add_pieces(const Span &span, int budget, float *parts);
    Piece whole(const Span &span) const;
    size_t part_floats(const Piece &whole, int budget) const;
    Cut cut(int rows, int inputs, int pairs) const;
    void add(Stage stage, int layer, int chunks);
    void add(Stage stage, int layer, const Cut &cut, const QuireMatrix &matrix);
    void work(int phase, int chunk, int thread);
    void work_rows(Stage stage, const QuireLayer *layer, int chunk);
    void multiply(const Cut &cut, int phase, int chunk, int thread, Product job) const;
    const void *likely_next(const Cut &cut, const Product &job, int phase, int run, int thread) const;
    size_t weight_bytes(const Cut &cut, Format format) const;
    void embed(int64_t token, float *out) const;
    Attention attention(int layer) const;
    void rotate(int layer, int first, int end);
    char *layer_cache(int layer) const;
    char *row(const Scratch &rows, ptrdiff_t index, int stride) const;

    const QuireModel model_;
    const std::vector<QuireLayer> layers_;
    const Variant &variant_;
    const int hidden_stride_, qkv_stride_, vocab_stride_, query_size_, group_, span_rows_;
    const size_t layer_size_;  // bytes of a layer's part of a block
    const size_t scratch_size_;

    std::mutex mutex_;
    const QuireBatch *batch_ = nullptr;
    std::vector<Span> spans_;
    std::vector<Piece> pieces_;  // of spans_
    std::vector<Piece> merges_;  // spans that were cut into tiles, each as a whole
    std::vector<Phases::Phase> run_phases_;
    std::vector<std::pair<Stage, int>> stages_;
    int row_run_ = 1;
    Cut qkv_cut_{}, output_cut_{}, gate_up_cut_{}, down_cut_{}, head_cut_{};

    Scratch stream_;   // [row][hidden_stride] float: the residual stream
    Scratch normed_;   // [row][hidden] activations
    Scratch qkv_;      // [row][qkv_stride] float
    Scratch queries_;  // [row][query_size] activations
    Scratch mixed_;    // [row][query_size] activations
    Scratch inner_;    // [row][inner] activations
    Scratch parts_;    // float: what pieces leave for kMerge
    Scratch working_;  // of each thread: attention, or decoded panels
    Phases phases_;  // last: its threads end before what they work on
};

}  // namespace quire
