// Sixteen floats at once, by the compiler's vector extension: one register with AVX-512, two with AVX2.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvrelay {

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t IntVector __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

inline __attribute__((always_inline)) Vector load(const float* source) {
  Vector value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline __attribute__((always_inline)) void store(float* target, Vector value) {
  std::memcpy(target, &value, sizeof value);
}

inline __attribute__((always_inline)) float sum(Vector v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  Quarter quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

inline __attribute__((always_inline)) Vector greater(Vector a, Vector b) { return a > b ? a : b; }

// e^x to about one unit in the last place, 0 below -87 and infinite above 88. By range reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial of
// degree 6 (Cephes' expf). NaN stays NaN.
inline __attribute__((always_inline)) Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f, highest = Vector{} + 88.0f;
  Vector bounded = x < lowest ? lowest : x;
  bounded = bounded > highest ? highest : bounded;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the lowest bits
  Vector shifted = bounded * 1.44269504088896341f + magic;
  Vector n = shifted - magic;
  Vector r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVector exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + (127 << 23);  // the bits of magic above the integer are shifted out
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  Vector result = x > highest ? Vector{} + __builtin_inff() : p * power;
  return x < lowest ? Vector{} : result;
}

}  // namespace kvrelay
