// What kvrelay/engine/kernels/native/kernels.py calls. All tensors are float32 and contiguous unless a stride is given.
#pragma once

#include <cstdint>

extern "C" {

// The KV cache of one layer and the batch of one step; kvrelay.engine.batch says what the fields mean.
struct KvrelayStep {
  const int64_t* rows;             // [T]
  const int32_t* query_starts;     // [B + 1]
  const int32_t* context_lengths;  // [B]
  const int32_t* block_tables;     // [B, table_width]
  int64_t num_tokens;
  int64_t num_chunks;
  int64_t table_width;
  int64_t block_size;
  int64_t block_stride;  // rows from one block to the next
  int64_t num_kv_heads;
  int64_t head_dim;  // a multiple of 16
  int64_t num_threads;
};

void kvrelay_add_rms_norm(float* hidden, const float* delta, const float* weight, float* output, int64_t num_rows,
                          int64_t size, float epsilon, int64_t num_threads);

void kvrelay_gated_silu(const float* gate_up, float* output, int64_t num_rows, int64_t size, int64_t num_threads);

void kvrelay_store(const KvrelayStep* step, const float* key, int64_t key_token_stride, int64_t key_head_stride,
                   const float* value, int64_t value_token_stride, int64_t value_head_stride, float* keys,
                   float* values);

// Norm weights are null where heads are not normalised.
void kvrelay_rotate_and_store(const KvrelayStep* step, float* heads, int64_t num_query_heads, const float* cosines,
                              const float* sines, const float* query_norm, const float* key_norm, float epsilon,
                              float* keys, float* values);

// A softcap of 0 means none.
void kvrelay_attend(const KvrelayStep* step, const float* query, int64_t query_token_stride, int64_t query_head_stride,
                    int64_t num_query_heads, const float* keys, const float* values, float* output, float scale,
                    float softcap);

// The weight and its panels are described in int8.cpp; scales and bias are padded to whole panels. The integers that
// rows are rounded to are at most `limit`, so large that no sum over a row exceeds 32 bits.
void kvrelay_int8_linear(const float* hidden, const int8_t* panels, const float* scales, const float* bias,
                         float* output, int64_t num_rows, int64_t in_size, int64_t out_size, int64_t limit,
                         int64_t num_threads);
}
