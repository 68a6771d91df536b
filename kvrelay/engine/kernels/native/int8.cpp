// Products of float rows with an 8-bit weight: y = x W^T + b.
//
// A row of x is rounded to 16-bit integers by a scale of its own, so a row's result depends on no other row. Products of
// 16-bit pairs are summed in 32 bits (vpmaddwd), which is exact: the caller limits the integers of x such that no sum
// overflows. So results are the same on every machine, in whatever order the sums are made. 8-bit integers for x would
// be no faster where weights come from memory, would lose more, and without AVX-512 VNNI their sums saturate.
//
// A weight lies in panels of 16 output channels: [panel, input pair, channel, 2]. A tile of the result, some rows by some
// panels, stays in registers while the inputs go by.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t kPanelChannels = 16;
constexpr int64_t kPairBytes = 2 * kPanelChannels;  // of a panel, for two inputs
constexpr int64_t kParallelProducts = 1 << 17;      // below, waking a thread costs more than it brings
constexpr int64_t kChunkIntegers = 1 << 13;         // of rows that go through all panels together, out of the L1 cache
constexpr int32_t kInfinity = 0x7f800000;           // bits of a float; those of NaN are larger
constexpr float kLeastMaximum = 1e-25f;             // a row with nothing larger counts as zeros

#ifdef __AVX512BW__
using Integers = __m512i;
constexpr int kTileRows = 10, kTilePanels = 2, kPanelVectors = 1;  // accumulators that fit 32 registers

inline Integers widen(const int8_t* source) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline Integers repeat(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Integers add_products(Integers sum, Integers a, Integers b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
inline void store_scaled(float* target, Integers sums, float row_scale, const float* scales, const float* bias) {
  const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(row_scale));
  _mm512_storeu_ps(target, _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, sums), scale, _mm512_loadu_ps(bias)));
}
#else
using Integers = __m256i;
constexpr int kTileRows = 4, kTilePanels = 1, kPanelVectors = 2;  // 16 registers of half a panel

inline Integers widen(const int8_t* source) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline Integers repeat(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Integers add_products(Integers sum, Integers a, Integers b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
inline void store_scaled(float* target, Integers sums, float row_scale, const float* scales, const float* bias) {
  const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(row_scale));
  _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, _mm256_loadu_ps(bias)));
}
#endif
constexpr int kVectorChannels = kPanelChannels / kPanelVectors;

struct Product {
  const int16_t* rows;      // [num_rows, 2 * num_pairs]
  const float* row_scales;  // [num_rows]
  const int8_t* panels;     // [num_panels, num_pairs, 16, 2]
  const float* scales;      // [num_panels * 16]
  const float* bias;        // [num_panels * 16]
  float* output;            // [num_rows, out_size]
  int64_t num_pairs, out_size;
};

// Gives the row's scale. A row with an infinity or NaN has the scale NaN, and so the result NaN.
float quantize_row(const float* row, int16_t* target, int64_t size, int64_t padded_size, int64_t limit) {
  int32_t bits = 0;
#pragma omp simd reduction(max : bits)
  for (int64_t i = 0; i < size; ++i) {
    int32_t value;
    std::memcpy(&value, row + i, sizeof value);
    bits = std::max(bits, value & 0x7fffffff);
  }
  float maximum;
  std::memcpy(&maximum, &bits, sizeof maximum);
  if (bits >= kInfinity || maximum < kLeastMaximum) {
    std::memset(target, 0, padded_size * sizeof *target);
    return bits >= kInfinity ? NAN : 0.0f;
  }
  const float inverse = static_cast<float>(limit) / maximum;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) target[i] = static_cast<int16_t>(static_cast<int32_t>(std::rint(row[i] * inverse)));
  std::fill(target + size, target + padded_size, static_cast<int16_t>(0));
  return maximum / static_cast<float>(limit);
}

template <int kRows, int kPanels>
void compute_tile(const Product& product, int64_t first_row, int64_t first_panel) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t row_size = 2 * product.num_pairs, panel_size = product.num_pairs * kPairBytes;
  const int16_t* rows = product.rows + first_row * row_size;
  const int8_t* panels = product.panels + first_panel * panel_size;
  Integers sums[kRows][kVectors] = {};
  for (int64_t pair = 0; pair < product.num_pairs; ++pair) {
    Integers weights[kVectors];
    for (int vector = 0; vector < kVectors; ++vector)
      weights[vector] = widen(panels + vector / kPanelVectors * panel_size + pair * kPairBytes +
                              vector % kPanelVectors * 2 * kVectorChannels);
    for (int row = 0; row < kRows; ++row) {
      int32_t inputs;
      std::memcpy(&inputs, rows + row * row_size + 2 * pair, sizeof inputs);
      const Integers repeated = repeat(inputs);
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = add_products(sums[row][vector], weights[vector], repeated);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int vector = 0; vector < kVectors; ++vector) {
      const int64_t channel = first_panel * kPanelChannels + vector * kVectorChannels;
      float* target = product.output + (first_row + row) * product.out_size + channel;
      const int64_t left = std::min<int64_t>(product.out_size - channel, kVectorChannels);
      float part[kVectorChannels];
      store_scaled(left == kVectorChannels ? target : part, sums[row][vector], product.row_scales[first_row + row],
                   product.scales + channel, product.bias + channel);
      if (left > 0 && left < kVectorChannels) std::memcpy(target, part, left * sizeof *part);
    }
}

template <int kRows, int kPanels>
void compute_rows(const Product& product, int64_t first_row, int64_t num_rows, int64_t first_panel) {
  if (num_rows == kRows) return compute_tile<kRows, kPanels>(product, first_row, first_panel);
  if constexpr (kRows > 1) compute_rows<kRows - 1, kPanels>(product, first_row, num_rows, first_panel);
}

// In blocks of equal height: 12 rows are two times 6, and not 10 and 2.
void compute(const Product& product, int64_t first_row, int64_t last_row, int64_t first_panel) {
  const int64_t num_rows = last_row - first_row, num_blocks = (num_rows + kTileRows - 1) / kTileRows;
  const bool whole = product.out_size > (first_panel + kTilePanels - 1) * kPanelChannels;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t start = block * num_rows / num_blocks, height = (block + 1) * num_rows / num_blocks - start;
    if (whole)
      compute_rows<kTileRows, kTilePanels>(product, first_row + start, height, first_panel);
    else
      compute_rows<kTileRows, 1>(product, first_row + start, height, first_panel);
  }
}

}  // namespace

void kvrelay_int8_linear(const float* hidden, const int8_t* panels, const float* scales, const float* bias,
                         float* output, int64_t num_rows, int64_t in_size, int64_t out_size, int64_t limit,
                         int64_t num_threads) {
  thread_local std::vector<int16_t> row_store;
  thread_local std::vector<float> scale_store;
  const int64_t num_pairs = (in_size + 1) / 2, num_panels = (out_size + kPanelChannels - 1) / kPanelChannels;
  row_store.resize(num_rows * num_pairs * 2);
  scale_store.resize(num_rows);
  int16_t* rows = row_store.data();
  float* row_scales = scale_store.data();
  const Product product{rows, row_scales, panels, scales, bias, output, num_pairs, out_size};
  const int64_t num_tiles = (num_panels + kTilePanels - 1) / kTilePanels;
  const int64_t chunk_rows = std::max<int64_t>(kChunkIntegers / (2 * num_pairs) / kTileRows, 1) * kTileRows;
  const int64_t num_chunks = (num_rows + chunk_rows - 1) / chunk_rows;
#pragma omp parallel num_threads(num_threads) if (num_rows * in_size * out_size >= kParallelProducts)
  {
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row)
      row_scales[row] = quantize_row(hidden + row * in_size, rows + row * num_pairs * 2, in_size, num_pairs * 2, limit);
#pragma omp for collapse(2)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk)
      for (int64_t tile = 0; tile < num_tiles; ++tile)
        compute(product, chunk * chunk_rows, std::min((chunk + 1) * chunk_rows, num_rows), tile * kTilePanels);
  }
}
