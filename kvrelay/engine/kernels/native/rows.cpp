// What each token does alone: norms, the gate, the rotation, and the way into the KV cache.
#include <cmath>

#include "kernels.h"
#include "vectors.h"

namespace {

using namespace kvrelay;

constexpr int64_t kParallelFrom = 1 << 14;  // floats; below, waking a thread costs more than it brings

float inverse_root_mean_square(const float* row, int64_t size, float epsilon) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += row[i] * row[i];
  return 1.0f / std::sqrt(squares / static_cast<float>(size) + epsilon);
}

Vector gate(Vector gate, Vector up) { return gate / (exponential(-gate) + 1.0f) * up; }

void normalise_head(float* head, const float* weight, int64_t size, float epsilon) {
  const float factor = inverse_root_mean_square(head, size, epsilon);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) head[i] = head[i] * factor * weight[i];
}

// Dimension i together with dimension i + size / 2.
void rotate_head(const float* head, float* target, const float* cosines, const float* sines, int64_t size) {
  const int64_t half = size / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    target[i] = first * cosines[i] - second * sines[i];
    target[i + half] = second * cosines[i] + first * sines[i];
  }
}

}  // namespace

void kvrelay_add_rms_norm(float* hidden, const float* delta, const float* weight, float* output, int64_t num_rows,
                          int64_t size, float epsilon, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= kParallelFrom)
  for (int64_t row = 0; row < num_rows; ++row) {
    float* hidden_row = hidden + row * size;
    float* output_row = output + row * size;
    if (delta != nullptr) {
      const float* delta_row = delta + row * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) hidden_row[i] += delta_row[i];
    }
    const float factor = inverse_root_mean_square(hidden_row, size, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) output_row[i] = hidden_row[i] * factor * weight[i];
  }
}

void kvrelay_gated_silu(const float* gate_up, float* output, int64_t num_rows, int64_t size, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= kParallelFrom / 4)
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* gates = gate_up + row * 2 * size;
    const float* ups = gates + size;
    float* target = output + row * size;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(target + i, gate(load(gates + i), load(ups + i)));
    for (; i < size; ++i) target[i] = gates[i] / (1.0f + std::exp(-gates[i])) * ups[i];
  }
}

void kvrelay_store(const KvrelayStep* step, const float* key, int64_t key_token_stride, int64_t key_head_stride,
                   const float* value, int64_t value_token_stride, int64_t value_head_stride, float* keys,
                   float* values) {
  const int64_t num_heads = step->num_kv_heads, size = step->head_dim;
#pragma omp parallel for num_threads(step->num_threads) if (step->num_tokens * num_heads * size >= kParallelFrom)
  for (int64_t token = 0; token < step->num_tokens; ++token) {
    const int64_t row = step->rows[token] * num_heads * size;
    for (int64_t head = 0; head < num_heads; ++head) {
      std::memcpy(keys + row + head * size, key + token * key_token_stride + head * key_head_stride,
                  size * sizeof(float));
      std::memcpy(values + row + head * size, value + token * value_token_stride + head * value_head_stride,
                  size * sizeof(float));
    }
  }
}

void kvrelay_rotate_and_store(const KvrelayStep* step, float* heads, int64_t num_query_heads, const float* cosines,
                              const float* sines, const float* query_norm, const float* key_norm, float epsilon,
                              float* keys, float* values) {
  const int64_t num_kv_heads = step->num_kv_heads, size = step->head_dim;
  const int64_t num_heads = num_query_heads + 2 * num_kv_heads;
#pragma omp parallel for num_threads(step->num_threads) if (step->num_tokens * num_heads * size >= kParallelFrom)
  for (int64_t token = 0; token < step->num_tokens; ++token) {
    const float* cosine = cosines + token * size / 2;
    const float* sine = sines + token * size / 2;
    const int64_t row = step->rows[token] * num_kv_heads * size;
    float* query = heads + token * num_heads * size;
    float* key = query + num_query_heads * size;
    for (int64_t head = 0; head < num_query_heads; ++head) {
      if (query_norm != nullptr) normalise_head(query + head * size, query_norm, size, epsilon);
      rotate_head(query + head * size, query + head * size, cosine, sine, size);
    }
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      if (key_norm != nullptr) normalise_head(key + head * size, key_norm, size, epsilon);
      rotate_head(key + head * size, keys + row + head * size, cosine, sine, size);
    }
    std::memcpy(values + row, key + num_kv_heads * size, num_kv_heads * size * sizeof(float));
  }
}
