#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

namespace quire {
namespace {

constexpr int kRunsPerThread = 6;       // runs of panels: what a slower thread leaves is done by the others
constexpr int kPiecesPerThread = 2;     // least pieces of attention
constexpr int kFewestTiles = 4;         // of a span that is cut into tiles
constexpr int kChunkRows = 8;           // rows of a phase that works row by row

int up_to(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
size_t up_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }
int parts(int value, int size) { return (value + size - 1) / size; }

CacheFormat cache_format(const QuireModel &model) { return static_cast<CacheFormat>(model.cache_format); }

Format format_of(const QuireMatrix &matrix) { return static_cast<Format>(matrix.format); }

}  // namespace

Scratch::~Scratch() { std::free(memory_); }

void Scratch::reserve(size_t bytes) {
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory_) throw std::bad_alloc();
    size_ = bytes;
}

Runner::Runner(const QuireModel &model, const Variant &variant, int thread_count)
    : model_(model),
      layers_(model.layers, model.layers + model.layer_count),
      variant_(variant),
      hidden_stride_(up_to(model.hidden, kPair)),
      qkv_stride_(up_to((model.heads + 2 * model.kv_heads) * model.head_dim, kPair)),
      vocab_stride_(up_to(model.vocab, kPair)),
      query_size_(model.heads * model.head_dim),
      group_(model.heads / model.kv_heads),
      span_rows_(std::max(variant.query_rows, group_)),
      layer_size_(2 * model.kv_heads * (model.block_size / kLane) * run_bytes(cache_format(model), model.head_dim)),
      scratch_size_(up_to_line(
          std::max({variant.attention_scratch(span_rows_, 1, model.head_dim),
                    variant.attention_scratch(group_, model.kv_heads, model.head_dim),
                    variant.product_scratch(std::max({model.hidden, model.inner, model.heads * model.head_dim}))}))),
      phases_(thread_count) {
    working_.reserve(scratch_size_ * thread_count);
}

void Runner::step(const QuireBatch &batch) {
    std::lock_guard<std::mutex> lock(mutex_);
    batch_ = &batch;
    plan();
    phases_.run(
        run_phases_,
        [](void *self, int phase, int chunk, int thread) { static_cast<Runner *>(self)->work(phase, chunk, thread); },
        this);
}

void Runner::plan() {
    const int rows = batch_->token_count, sampled = batch_->sampled_count;
    const size_t count = std::max(rows, sampled), item = variant_.activation_bytes;
    stream_.reserve(count * hidden_stride_ * sizeof(float));
    normed_.reserve(count * model_.hidden * item);
    qkv_.reserve(count * qkv_stride_ * sizeof(float));
    queries_.reserve(count * query_size_ * item);
    mixed_.reserve(count * query_size_ * item);
    inner_.reserve(count * model_.inner * item);
    plan_spans();
    plan_pieces();
    qkv_cut_ = cut(rows, model_.hidden, qkv_stride_ / kPair);
    output_cut_ = cut(rows, query_size_, hidden_stride_ / kPair);
    gate_up_cut_ = cut(rows, model_.hidden, model_.inner / kLane);
    down_cut_ = cut(rows, model_.inner, hidden_stride_ / kPair);
    head_cut_ = cut(sampled, model_.hidden, vocab_stride_ / kPair);
    row_run_ = std::clamp(parts(rows, phases_.thread_count()), 1, kChunkRows);

    run_phases_.clear();
    stages_.clear();
    const int row_chunks = parts(rows, row_run_);
    add(kEmbed, 0, row_chunks);
    for (int index = 0; index < model_.layer_count; ++index) {
        const QuireLayer &layer = layers_[index];
        add(kInputNorm, index, row_chunks);
        add(kQkv, index, qkv_cut_, layer.qkv);
        add(kRotate, index, row_chunks);
        add(kAttend, index, static_cast<int>(pieces_.size()));
        if (!merges_.empty()) add(kMerge, index, static_cast<int>(merges_.size()));
        add(kOutput, index, output_cut_, layer.output);
        add(kMlpNorm, index, row_chunks);
        add(kGateUp, index, gate_up_cut_, layer.gate_up);
        add(kDown, index, down_cut_, layer.down);
    }
    if (sampled == 0) return;
    add(kFinalNorm, 0, sampled);
    add(kHead, 0, head_cut_, model_.head);
    add(kBest, 0, sampled);
}

void Runner::add(Stage stage, int layer, int chunks) {
    stages_.emplace_back(stage, layer);
    run_phases_.push_back({chunks, {}});
}

void Runner::add(Stage stage, int layer, const Cut &cut, const QuireMatrix &matrix) {
    // Phases since the last one that reads weights ask for the first of these. With many rows there is no need: products
    // take longer than memory.
    if (cut.tile_count == 1) {
        const Phases::Reads reads{static_cast<const char *>(matrix.panels), weight_bytes(cut, format_of(matrix))};
        for (auto phase = run_phases_.rbegin(); phase != run_phases_.rend() && !phase->ahead.start; ++phase)
            phase->ahead = reads;
    }
    add(stage, layer, cut.tile_count * cut.run_count);
}

void Runner::plan_spans() {
    spans_.clear();
    const int most = std::max(1, span_rows_ / group_);
    for (int sequence = 0; sequence < batch_->sequence_count; ++sequence) {
        const int first = static_cast<int>(batch_->query_starts[sequence]);
        const int end = static_cast<int>(batch_->query_starts[sequence + 1]);
        const int context = static_cast<int>(batch_->context_lens[sequence]);
        const int32_t *table = batch_->tables + static_cast<ptrdiff_t>(sequence) * batch_->table_stride;
        for (int row = first; row < end; row += most) {
            const int count = std::min(most, end - row);
            spans_.push_back({table, row, count, context - (end - row - count)});
        }
    }
    // The longest first: what is left at the end of a phase is short.
    std::stable_sort(spans_.begin(), spans_.end(), [](const Span &a, const Span &b) { return a.context > b.context; });
}

Piece Runner::whole(const Span &span) const {
    const int start = model_.window ? std::max(0, span.context - span.count + 1 - model_.window) : 0;
    return {&span, 0, model_.kv_heads, start / kTile, parts(span.context, kTile), nullptr};
}

// Floats that the tiles of a span leave if it is cut into tiles, else 0. One query is cut so, if its context is long.
size_t Runner::part_floats(const Piece &whole, int budget) const {
    const int tiles = whole.end_tile - whole.first_tile;
    if (whole.span->count > 1 || tiles < kFewestTiles || tiles <= budget) return 0;
    return static_cast<size_t>(tiles) * model_.heads * (model_.head_dim + 2);
}

// Cuts spans so that threads have alike to do. Where the cuts are changes no bit of the result.
void Runner::plan_pieces() {
    pieces_.clear();
    merges_.clear();
    int total = 0;  // tiles, of each head
    for (const Span &span : spans_) total += (whole(span).end_tile - whole(span).first_tile) * model_.kv_heads;
    const int threads = phases_.thread_count();
    const int budget = threads == 1 ? total : std::max(1, total / (threads * kPiecesPerThread));
    size_t floats = 0;
    for (const Span &span : spans_) floats += part_floats(whole(span), budget);
    parts_.reserve(floats * sizeof(float));
    floats = 0;
    for (const Span &span : spans_) {
        add_pieces(span, budget, parts_.as<float>() + floats);
        floats += part_floats(whole(span), budget);
    }
}

void Runner::add_pieces(const Span &span, int budget, float *parts) {
    const Piece all = whole(span);
    if (part_floats(all, budget)) {
        Piece piece = all;
        piece.parts = parts;
        merges_.push_back(piece);
        const int tiles = std::max(1, budget / model_.kv_heads);
        for (; piece.first_tile < all.end_tile; piece.first_tile = piece.end_tile) {
            piece.parts = parts + part_floats(all, budget) / (all.end_tile - all.first_tile) *
                                      (piece.first_tile - all.first_tile);
            piece.end_tile = std::min(piece.first_tile + tiles, all.end_tile);
            pieces_.push_back(piece);
        }
        return;
    }
    // Heads one by one where many rows attend: what they share stays near.
    const int heads = span.count > 1 ? 1 : std::clamp(budget / (all.end_tile - all.first_tile), 1, model_.kv_heads);
    for (int head = 0; head < model_.kv_heads; head += heads) {
        Piece piece = all;
        piece.first_head = head;
        piece.head_count = std::min(heads, model_.kv_heads - head);
        pieces_.push_back(piece);
    }
}

Runner::Cut Runner::cut(int rows, int inputs, int pairs) const {
    const int fitting = std::clamp(variant_.product_bytes / (inputs * variant_.activation_bytes), 12, variant_.product_rows);
    Cut cut{};
    cut.rows = rows;
    cut.inputs = inputs;
    cut.tile_count = parts(rows, fitting);
    cut.tile_rows = cut.tile_count ? parts(rows, cut.tile_count) : 0;
    cut.pairs = pairs;
    const int threads = phases_.thread_count();
    if (threads == 1 || rows == 0) {
        cut.run_pairs = pairs;
        cut.run_count = 1;
        return cut;
    }
    // Runs as long as one could wish, or up to twice that: what lets all threads end first.
    const int wished = parts(pairs, std::clamp(threads * kRunsPerThread / cut.tile_count, 1, pairs));
    const auto longest = [&](int run_pairs) {
        return parts(parts(pairs, run_pairs) * cut.tile_count, threads) * run_pairs;
    };
    cut.run_pairs = wished;
    for (int run_pairs = wished + 1; run_pairs <= std::min(2 * wished, pairs); ++run_pairs)
        if (longest(run_pairs) < longest(cut.run_pairs)) cut.run_pairs = run_pairs;
    cut.run_count = parts(pairs, cut.run_pairs);
    return cut;
}

char *Runner::layer_cache(int layer) const { return static_cast<char *>(batch_->cache) + layer * layer_size_; }

char *Runner::row(const Scratch &rows, ptrdiff_t index, int stride) const {
    return rows.as<char>() + index * stride * variant_.activation_bytes;
}

void Runner::work(int phase, int chunk, int thread) {
    const auto [stage, index] = stages_[phase];
    const QuireLayer *layer = &layers_[index];
    const int hidden = model_.hidden, inner = model_.inner, threads = phases_.thread_count();
    switch (stage) {
        case kQkv:
            return multiply(qkv_cut_, phase, chunk, thread,
                            {layer->qkv.panels, format_of(layer->qkv), hidden / 2, normed_.as<void>(), hidden,
                             Epilogue::kStore, layer->qkv_bias, qkv_.as<float>(), nullptr, qkv_stride_, nullptr});
        case kOutput:
            return multiply(output_cut_, phase, chunk, thread,
                            {layer->output.panels, format_of(layer->output), query_size_ / 2, mixed_.as<void>(),
                             query_size_, Epilogue::kAdd, layer->output_bias, stream_.as<float>(), nullptr,
                             hidden_stride_, nullptr});
        case kGateUp:
            return multiply(gate_up_cut_, phase, chunk, thread,
                            {layer->gate_up.panels, format_of(layer->gate_up), hidden / 2, normed_.as<void>(), hidden,
                             Epilogue::kSwiGLU, nullptr, nullptr, inner_.as<void>(), inner, nullptr});
        case kDown:
            return multiply(down_cut_, phase, chunk, thread,
                            {layer->down.panels, format_of(layer->down), inner / 2, inner_.as<void>(), inner,
                             Epilogue::kAdd, nullptr, stream_.as<float>(), nullptr, hidden_stride_, nullptr});
        case kHead:
            return multiply(head_cut_, phase, chunk, thread,
                            {model_.head.panels, format_of(model_.head), hidden / 2, normed_.as<void>(), hidden,
                             Epilogue::kStore, nullptr, batch_->logits, nullptr, vocab_stride_, nullptr});
        case kAttend:
            return variant_.attend(attention(index), pieces_[chunk],
                                   chunk + threads < static_cast<int>(pieces_.size()) ? &pieces_[chunk + threads] : nullptr,
                                   working_.as<char>() + thread * scratch_size_);
        case kMerge:
            return variant_.merge(attention(index), merges_[chunk]);
        case kRotate:
            return rotate(index, chunk * row_run_, std::min((chunk + 1) * row_run_, batch_->token_count));
        default:
            return work_rows(stage, layer, chunk);
    }
}

void Runner::work_rows(Stage stage, const QuireLayer *layer, int chunk) {
    const int hidden = model_.hidden;
    const auto stream = [&](ptrdiff_t index) { return stream_.as<float>() + index * hidden_stride_; };
    if (stage == kBest) {
        batch_->best[chunk] =
            variant_.best(batch_->logits + static_cast<ptrdiff_t>(chunk) * vocab_stride_, model_.vocab);
        return;
    }
    if (stage == kFinalNorm) {
        variant_.norm(stream(batch_->sampled_rows[chunk]), model_.final_norm, model_.eps, hidden,
                      row(normed_, chunk, hidden));
        return;
    }
    const int end = std::min((chunk + 1) * row_run_, batch_->token_count);
    for (int index = chunk * row_run_; index < end; ++index)
        if (stage == kEmbed)
            embed(batch_->tokens[index], stream(index));
        else
            variant_.norm(stream(index), stage == kInputNorm ? layer->input_norm : layer->mlp_norm, model_.eps, hidden,
                          row(normed_, index, hidden));
}

void Runner::embed(int64_t token, float *out) const {
    const QuireMatrix &table = model_.embeddings;
    if (format_of(table) == Format::kBf16)
        variant_.embed(static_cast<const uint16_t *>(table.panels) + token * model_.hidden, model_.hidden, out);
    else
        variant_.embed_panels(table.panels, format_of(table), token, model_.hidden, out);
}

void Runner::multiply(const Cut &cut, int phase, int chunk, int thread, Product job) const {
    // Tiles change fastest: the same weights are then still near.
    const int tile = chunk % cut.tile_count, run = chunk / cut.tile_count;
    if (cut.tile_count == 1) job.next = likely_next(cut, job, phase, run, thread);
    variant_.product(job, tile * cut.tile_rows, std::min((tile + 1) * cut.tile_rows, cut.rows), run * cut.run_pairs,
                     std::min((run + 1) * cut.run_pairs, cut.pairs),
                     working_.as<char>() + thread * scratch_size_);
}

// Panels that this thread is likely to multiply after a run: of this matrix, else of the next one.
const void *Runner::likely_next(const Cut &cut, const Product &job, int phase, int run, int thread) const {
    const int after = run + phases_.thread_count();
    if (after < cut.run_count)
        return static_cast<const char *>(job.panels) + after * weight_bytes(cut, job.format);
    const Phases::Reads &ahead = run_phases_[phase].ahead;
    return ahead.start ? ahead.start + thread * ahead.chunk_bytes : nullptr;
}

size_t Runner::weight_bytes(const Cut &cut, Format format) const {
    return 2 * cut.run_pairs * variant_.panel_bytes(format, cut.inputs);
}

Attention Runner::attention(int layer) const {
    return {queries_.as<void>(), mixed_.as<void>(), cache_format(model_), layer_cache(layer),
            layer_size_ * model_.layer_count, model_.heads, model_.kv_heads, model_.head_dim, model_.block_size, model_.window};
}

void Runner::rotate(int layer, int first, int end) {
    const Rotation job{qkv_.as<float>(), qkv_stride_, queries_.as<void>(), batch_->positions, batch_->slots,
                       model_.cosines, model_.sines, layers_[layer].q_norm, layers_[layer].k_norm, cache_format(model_),
                       layer_cache(layer), layer_size_ * model_.layer_count, model_.heads, model_.kv_heads, model_.head_dim,
                       model_.block_size, model_.eps, 1.0f / std::sqrt(static_cast<float>(model_.head_dim))};
    variant_.rotate(job, first, end);
}

}  // namespace quire
