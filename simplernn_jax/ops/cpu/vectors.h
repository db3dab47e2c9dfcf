/* Types and functions of vectors that the C files share. */

#ifndef SIMPLERNN_VECTORS_H
#define SIMPLERNN_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Vectors of the machine's size, since the compiler spills larger ones. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

#define VECTOR(type, name) typedef type name __attribute__((vector_size(LANES * sizeof(type))))
#define UNALIGNED(type, name) \
  typedef type name __attribute__((vector_size(LANES * sizeof(type)), aligned(1), may_alias))
VECTOR(float, Lanes);
UNALIGNED(float, FloatsAt);

#define EPSILON 1e-6f
#define SUMS 16

/* Independent sums per lane: a single one would be bound by the latency of additions. */
static inline float dot(const float *restrict a, const float *restrict b, int64_t n) {
  float lanes[SUMS] = {0}, sum = 0;
  int64_t i = 0;
  for (; i + SUMS <= n; i += SUMS)
    for (int j = 0; j < SUMS; j++) lanes[j] += a[i + j] * b[i + j];
  for (; i < n; i++) sum += a[i] * b[i];
  for (int j = 0; j < SUMS; j++) sum += lanes[j];
  return sum;
}

/* 1 / the root of the mean square. */
static inline float scale_of(const float *x, int64_t n) { return 1 / sqrtf(dot(x, x, n) / n + EPSILON); }

/* e^x within 2 units in the last place; x is clipped to the exponents of normal numbers. */
static inline float exponential(float x) {
  x = x > 87.f ? 87.f : x;
  x = x < -87.f ? -87.f : x;
  const float shifted = x * 1.44269504f + 12582912.f; /* an integer in its lowest bits */
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000;
  float power;
  memcpy(&power, &bits, 4);
  return y * power;
}

#endif
