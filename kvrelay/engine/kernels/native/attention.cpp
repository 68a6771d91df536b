// Attention over a paged KV cache, without copies and without padding.
//
// The work is cut into pieces of one chunk, some KV heads and some rows; a row is one query head of one token, and all
// query heads of a KV head read its keys once. A piece computes its scores against the whole context, then the
// softmax, then the weighted sum of the values. A piece of few rows is bound by memory: it takes dot products, and
// all heads of a token in turn, as they lie in the cache. One of many rows is bound by arithmetic: it has one KV head,
// its keys are turned to lanes, and rows are blocked in registers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace {

using namespace kvrelay;

#ifdef __AVX512F__
constexpr int kScoreRows = 8, kSumRows = 4, kPanel = 4;  // accumulators that fit 32 registers of 16 lanes
#else
constexpr int kScoreRows = 4, kSumRows = 2, kPanel = 2;  // 16 registers of 8 lanes
#endif
constexpr int64_t kPieceRows = 64;
constexpr int64_t kParallelFrom = 1 << 18;  // multiplications; below, waking a thread costs more than it brings
constexpr int64_t kFewRows = 8;
constexpr int64_t kStreamedTokens = 64;  // whose values all heads read before the next ones, as they lie in memory

struct Layer {
  const float* query;
  int64_t query_token_stride, query_head_stride;
  int64_t num_query_heads, group;  // query heads, and those that share a KV head
  const float *keys, *values;
  float* output;
  float scale, softcap;
};

// The rows [first, last) of some KV heads in one chunk; row r is query head r % group of token r / group.
struct Piece {
  int64_t chunk, first_head, num_heads, first, last;
};

// Context tokens [first, last) at one KV head.
struct Range {
  int64_t kv_head, first, last;
};

struct Scratch {
  std::vector<int64_t> offsets;  // [C], of each context token's keys and values
  std::vector<float> scores;     // [KV heads of the piece, rows, C rounded up to lanes]
  std::vector<float> turned;     // [head_dim, lanes]
};

class Attention {
 public:
  Attention(const KvrelayStep& step, const Layer& layer) : step_(step), layer_(layer) {}

  void run(const Piece& piece, Scratch& scratch) const {
    const int64_t num_rows = piece.last - piece.first;
    const int64_t context = limit(piece, num_rows - 1);
    const int64_t width = (context + kLanes - 1) / kLanes * kLanes;
    find_offsets(piece, context, scratch);
    scratch.scores.resize(piece.num_heads * num_rows * width);
    if (num_rows <= kFewRows)
      score_by_dots(piece, num_rows, context, width, scratch);
    else
      score_by_lanes(piece, num_rows, context, width, scratch);
    for (int64_t i = 0; i < piece.num_heads * num_rows; ++i)
      softmax(&scratch.scores[i * width], limit(piece, i % num_rows), width);
    const int64_t stride = num_rows <= kFewRows ? kStreamedTokens : context;
    for (int64_t first = 0; first < context; first += stride)
      for (int64_t head = 0; head < piece.num_heads; ++head) {
        const Range range{piece.first_head + head, first, std::min(first + stride, context)};
        const float* weights = &scratch.scores[head * num_rows * width];
        int64_t row = 0;
        for (; row + kSumRows <= num_rows; row += kSumRows)
          sum_values<kSumRows>(piece, range, row, weights + row * width, width, scratch);
        for (; row < num_rows; ++row) sum_values<1>(piece, range, row, weights + row * width, width, scratch);
      }
  }

 private:
  // Context tokens that a row of the piece attends to.
  int64_t limit(const Piece& piece, int64_t row) const {
    const int64_t length = step_.query_starts[piece.chunk + 1] - step_.query_starts[piece.chunk];
    return step_.context_lengths[piece.chunk] - length + (piece.first + row) / layer_.group + 1;
  }

  const float* query(const Piece& piece, int64_t kv_head, int64_t row) const {
    const int64_t token = step_.query_starts[piece.chunk] + (piece.first + row) / layer_.group;
    const int64_t head = kv_head * layer_.group + (piece.first + row) % layer_.group;
    return layer_.query + token * layer_.query_token_stride + head * layer_.query_head_stride;
  }

  float* output(const Piece& piece, int64_t kv_head, int64_t row) const {
    const int64_t token = step_.query_starts[piece.chunk] + (piece.first + row) / layer_.group;
    const int64_t head = kv_head * layer_.group + (piece.first + row) % layer_.group;
    return layer_.output + (token * layer_.num_query_heads + head) * step_.head_dim;
  }

  void find_offsets(const Piece& piece, int64_t context, Scratch& scratch) const {
    scratch.offsets.resize(context);
    const int32_t* table = step_.block_tables + piece.chunk * step_.table_width;
    for (int64_t first = 0; first < context; first += step_.block_size) {
      const int64_t row = table[first / step_.block_size] * step_.block_stride;
      const int64_t count = std::min(step_.block_size, context - first);
      for (int64_t slot = 0; slot < count; ++slot)
        scratch.offsets[first + slot] = (row + slot) * step_.num_kv_heads * step_.head_dim;
    }
  }

  void score_by_dots(const Piece& piece, int64_t num_rows, int64_t context, int64_t width, Scratch& scratch) const {
    switch (step_.head_dim / kLanes) {
      case 4: return score_by_dots<4>(piece, num_rows, context, width, scratch);
      case 8: return score_by_dots<8>(piece, num_rows, context, width, scratch);
      default: return score_by_dots<0>(piece, num_rows, context, width, scratch);
    }
  }

  // kVectors: vectors of a head, 0 if they are not known when this is compiled.
  template <int kVectors>
  void score_by_dots(const Piece& piece, int64_t num_rows, int64_t context, int64_t width, Scratch& scratch) const {
    const int64_t num_vectors = kVectors != 0 ? kVectors : step_.head_dim / kLanes;
    for (int64_t first = 0; first < context; first += kLanes) {
      const int64_t last = std::min(first + kLanes, context);
      for (int64_t i = 0; i < piece.num_heads * num_rows; ++i) {
        const int64_t kv_head = piece.first_head + i / num_rows;
        const float* q = query(piece, kv_head, i % num_rows);
        const float* keys = layer_.keys + kv_head * step_.head_dim;
        for (int64_t token = first; token < last; ++token) {
          const float* key = keys + scratch.offsets[token];
          Vector products = load(q) * load(key);
          for (int64_t d = 1; d < num_vectors; ++d) products += load(q + d * kLanes) * load(key + d * kLanes);
          scratch.scores[i * width + token] = sum(products);
        }
      }
    }
  }

  void score_by_lanes(const Piece& piece, int64_t num_rows, int64_t context, int64_t width, Scratch& scratch) const {
    scratch.turned.resize(step_.head_dim * kLanes);
    for (int64_t first = 0; first < context; first += kLanes) {
      turn_keys(piece, first, std::min(kLanes, context - first), scratch);
      int64_t row = 0;
      for (; row + kScoreRows <= num_rows; row += kScoreRows)
        score_block<kScoreRows>(piece, row, first, width, scratch);
      for (; row < num_rows; ++row) score_block<1>(piece, row, first, width, scratch);
    }
  }

  // `turned[d][lane]` is dimension d of the key of token `first + lane`.
  void turn_keys(const Piece& piece, int64_t first, int64_t count, Scratch& scratch) const {
    float* turned = scratch.turned.data();
    for (int64_t lane = 0; lane < count; ++lane) {
      const float* key = layer_.keys + piece.first_head * step_.head_dim + scratch.offsets[first + lane];
      for (int64_t d = 0; d < step_.head_dim; ++d) turned[d * kLanes + lane] = key[d];
    }
    for (int64_t lane = count; lane < kLanes; ++lane)
      for (int64_t d = 0; d < step_.head_dim; ++d) turned[d * kLanes + lane] = 0.0f;
  }

  template <int kRows>
  void score_block(const Piece& piece, int64_t row, int64_t first, int64_t width, Scratch& scratch) const {
    if (first >= limit(piece, row + kRows - 1)) return;
    const float* queries[kRows];
    Vector scores[kRows] = {};
    for (int i = 0; i < kRows; ++i) queries[i] = query(piece, piece.first_head, row + i);
    const float* turned = scratch.turned.data();
    for (int64_t d = 0; d < step_.head_dim; ++d) {
      const Vector keys = load(turned + d * kLanes);
      for (int i = 0; i < kRows; ++i) scores[i] += keys * queries[i][d];
    }
    for (int i = 0; i < kRows; ++i) store(&scratch.scores[(row + i) * width + first], scores[i]);
  }

  // Scores to weights that add up to 1; 0 from `limit` to the row's end.
  void softmax(float* scores, int64_t limit, int64_t width) const {
    const int64_t padded = (limit + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, scale(load(scores + i)));
    std::fill(scores + limit, scores + padded, -std::numeric_limits<float>::infinity());
    Vector largest = load(scores);
    for (int64_t i = kLanes; i < padded; i += kLanes) largest = greater(load(scores + i), largest);
    float maximum = largest[0];
    for (int lane = 1; lane < kLanes; ++lane) maximum = std::max(maximum, largest[lane]);
    Vector total = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vector weights = exponential(load(scores + i) - maximum);
      store(scores + i, weights);
      total += weights;
    }
    const float inverse = 1.0f / sum(total);
    for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, load(scores + i) * inverse);
    std::fill(scores + padded, scores + width, 0.0f);
  }

  Vector scale(Vector scores) const {
    scores *= layer_.scale;
    if (layer_.softcap != 0.0f)
      for (int lane = 0; lane < kLanes; ++lane) scores[lane] = layer_.softcap * std::tanh(scores[lane] / layer_.softcap);
    return scores;
  }

  template <int kRows>
  void sum_values(const Piece& piece, const Range& range, int64_t row, const float* weights, int64_t width,
                  const Scratch& scratch) const {
    const int64_t num_vectors = step_.head_dim / kLanes;
    int64_t vector = 0;
    for (; vector + kPanel <= num_vectors; vector += kPanel)
      sum_panel<kRows, kPanel>(piece, range, row, vector * kLanes, weights, width, scratch);
    for (; vector < num_vectors; ++vector)
      sum_panel<kRows, 1>(piece, range, row, vector * kLanes, weights, width, scratch);
  }

  // Adds the range's weighted values to the output's dimensions from d on; the first range begins with zero.
  template <int kRows, int kVectors>
  void sum_panel(const Piece& piece, const Range& range, int64_t row, int64_t d, const float* weights, int64_t width,
                 const Scratch& scratch) const {
    Vector sums[kRows][kVectors] = {};
    float* outputs[kRows];
    for (int i = 0; i < kRows; ++i) outputs[i] = output(piece, range.kv_head, row + i) + d;
    if (range.first > 0)
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) sums[i][v] = load(outputs[i] + v * kLanes);
    const float* values = layer_.values + range.kv_head * step_.head_dim + d;
    const int64_t last = std::min(range.last, limit(piece, row + kRows - 1));
    for (int64_t token = range.first; token < last; ++token) {
      const float* value = values + scratch.offsets[token];
      Vector parts[kVectors];
      for (int v = 0; v < kVectors; ++v) parts[v] = load(value + v * kLanes);
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) sums[i][v] += parts[v] * weights[i * width + token];
    }
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) store(outputs[i] + v * kLanes, sums[i][v]);
  }

  const KvrelayStep& step_;
  const Layer& layer_;
};

// Multiplications of the scores, if all rows attended to their whole context.
int64_t work(const KvrelayStep& step, int64_t num_query_heads) {
  int64_t products = 0;
  for (int64_t chunk = 0; chunk < step.num_chunks; ++chunk)
    products += static_cast<int64_t>(step.query_starts[chunk + 1] - step.query_starts[chunk]) * step.context_lengths[chunk];
  return products * num_query_heads * step.head_dim;
}

std::vector<Piece> cut(const KvrelayStep& step, int64_t group) {
  // With few chunks heads are shared out among the threads, too.
  const int64_t heads_together = step.num_chunks >= 4 * step.num_threads ? step.num_kv_heads : 1;
  std::vector<Piece> pieces;
  for (int64_t chunk = 0; chunk < step.num_chunks; ++chunk) {
    const int64_t num_rows = (step.query_starts[chunk + 1] - step.query_starts[chunk]) * group;
    const int64_t num_heads = num_rows <= kFewRows ? heads_together : 1;
    for (int64_t first = 0; first < num_rows; first += kPieceRows)
      for (int64_t head = 0; head < step.num_kv_heads; head += num_heads)
        pieces.push_back({chunk, head, num_heads, first, std::min(first + kPieceRows, num_rows)});
  }
  return pieces;
}

}  // namespace

void kvrelay_attend(const KvrelayStep* step, const float* query, int64_t query_token_stride, int64_t query_head_stride,
                    int64_t num_query_heads, const float* keys, const float* values, float* output, float scale,
                    float softcap) {
  const int64_t group = num_query_heads / step->num_kv_heads;
  const Layer layer{query, query_token_stride, query_head_stride, num_query_heads, group,
                    keys,  values,             output,            scale,           softcap};
  const Attention attention(*step, layer);
  const std::vector<Piece> pieces = cut(*step, group);
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
#pragma omp parallel num_threads(step->num_threads) if (work(*step, num_query_heads) >= kParallelFrom)
  {
    thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_pieces; ++i) attention.run(pieces[i], scratch);
  }
}
