/* Matrices ``[in, out]`` as panels of PANEL outputs, in float32 or fewer bits, and their products
   with the vectors of several sequences.

   A matrix is ``values [panels, in, PANEL]``, which one pass reads in order, times
   ``scales [panels, groups, PANEL]`` of groups of inputs. Values are float32 or bfloat16, or
   integers in 8 bits with one group or in 4 bits with groups of GROUP inputs. Several matrices of
   one shape have an axis in front.

   Values of bfloat16 of outputs PANEL / 2 apart share 32 bits, the first in the lowest.

   Integers of 8 (4) bits are stored plus 128 (8), four (eight) inputs in a word of 32 bits:
   ``[panels, in / 4 (8), PANEL]``. From bit 8k (4k) on are the integers of input 2k in the lower
   half of the word and of 2k + 1 in the upper half. So a shift and a mask unpack two inputs.

   Inputs are rounded to 16 bits, x = fixed * step, with a step for each INPUT_BLOCK (GROUP) inputs
   that follows from the largest one. Products of two inputs and their sum are one instruction, and
   exact.

   Each output is summed in the order of its inputs: the bits of a sequence's results do not depend
   on how many there are. */

#ifndef SIMPLERNN_PANELS_H
#define SIMPLERNN_PANELS_H

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <math.h>

#include "call.h"
#include "vectors.h"

#define PANEL 64
#define GROUP 64
#define INPUT_BLOCK 512 /* the most whose sums fit 32 bits: 512 * 32767 * 128 < 2^31 */
#define ROWS 6 /* sequences whose sums are kept in registers */

/* Of TILE vectors, the sums of ROWS sequences fit the registers. */
#define TILE (REGISTERS / 8)

VECTOR(int32_t, Integers);
VECTOR(uint32_t, Words);
UNALIGNED(uint32_t, WordsAt);

enum { FLOAT32 = XLA_FFI_DataType_F32, BFLOAT16 = XLA_FFI_DataType_BF16 };
enum { INT8 = XLA_FFI_DataType_S32, INT4 = XLA_FFI_DataType_U32 }; /* of words */

typedef struct {
  const char *values;
  const float *scales;
  int64_t inputs, outputs, panels, groups, group;
} Matrix;

/* Inputs of a word; floats are apart. */
INLINE int64_t values_per_word(const int format) {
  return format == INT8 ? 4 : format == INT4 ? 8 : 1;
}

/* Bytes of a panel of `inputs`. */
INLINE int64_t panel_bytes(const int format, int64_t inputs) {
  return divided(inputs, values_per_word(format)) * PANEL * (format == BFLOAT16 ? 2 : 4);
}

/* Values of LANES outputs from `column` of a panel, for input i. */
INLINE Lanes values_at(const char *panel, const int format, int64_t i, int64_t column) {
  if (format == FLOAT32) return *(const FloatsAt *)(panel + 4 * (i * PANEL + column));
  const Words two = *(const WordsAt *)(panel + 2 * i * PANEL + 4 * (column % (PANEL / 2)));
  return (Lanes)(column < PANEL / 2 ? two << 16 : two & 0xffff0000);
}

/* Value of one output of a panel for input i. */
INLINE float value_at(const char *panel, const int format, int64_t i, int64_t column) {
  const int64_t n = values_per_word(format), bits = 32 / n, place = i % n;
  const int64_t first = column / LANES * LANES;
  if (n == 1) return values_at(panel, format, i, first)[column - first];
  const uint32_t word = ((const uint32_t *)panel)[i / n * PANEL + column];
  const int32_t stored = word >> (place / 2 * bits + place % 2 * 16) & ((1 << bits) - 1);
  return stored - (1 << (bits - 1));
}

/* Outputs ``[rows, w * LANES]`` from `column` of a panel of floats. */
INLINE void multiply_tile(const Matrix *m, int64_t panel, const int format, const int rows,
                          const int w, int64_t column, const float *x, float *to) {
  const char *values = m->values + panel * panel_bytes(format, m->inputs);
  const float *scales = m->scales + panel * PANEL + column;
  Lanes sum[ROWS][PANEL / LANES];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w; j++) sum[r][j] = (Lanes){0};
  for (int64_t i = 0; i < m->inputs; i++) {
    Lanes weights[PANEL / LANES];
    for (int j = 0; j < w; j++) weights[j] = values_at(values, format, i, column + j * LANES);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < w; j++) sum[r][j] += weights[j] * x[r * m->inputs + i];
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w; j++) {
      FloatsAt *at = (FloatsAt *)(to + r * PANEL + column + j * LANES);
      *at = sum[r][j] * *(const FloatsAt *)(scales + j * LANES);
    }
}

/* x as integers times the step that is returned; zeros follow up to a multiple of 8. Where x is not
   finite, all are zeros and the step is NaN. */
static float to_fixed(const float *x, int64_t n, int16_t *fixed) {
  uint32_t bits[INPUT_BLOCK], largest = 0;
  memset(fixed, 0, sizeof(int16_t) * divided(n, 8) * 8);
  memcpy(bits, x, sizeof(float) * n);
  for (int64_t i = 0; i < n; i++) {
    const uint32_t size = bits[i] & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  float maximum;
  memcpy(&maximum, &largest, 4);
  if (!isfinite(maximum)) return NAN;
  const float by = 32767 / (maximum > 1e-30f ? maximum : 1e-30f);
  for (int64_t i = 0; i < n; i++) {
    const float shifted = x[i] * by + 12582912.f; /* an integer in its lowest bits */
    memcpy(&bits[i], &shifted, 4);
    fixed[i] = bits[i];
  }
  return 1 / by;
}

/* sum + a * b over both halves of each 32 bits, which are signed integers. */
INLINE Integers add_products(Integers sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
  return sum + (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t c = (int16x8_t)a, d = (int16x8_t)b;
  const int32x4_t low = vmull_s16(vget_low_s16(c), vget_low_s16(d));
  return sum + (Integers)vpaddq_s32(low, vmull_high_s16(c, d));
#else
  const Integers low = ((Integers)(a << 16) >> 16) * ((Integers)(b << 16) >> 16);
  return sum + low + ((Integers)a >> 16) * ((Integers)b >> 16);
#endif
}

/* Add outputs of one block of inputs, `count` words from `words` on. */
INLINE void multiply_words(const uint32_t *words, const float *scales, const int format,
                           const int rows, const int w, int64_t count, int16_t (*fixed)[INPUT_BLOCK],
                           const int32_t *offsets, const float *steps, float *to) {
  const int pairs = values_per_word(format) / 2, bits = 16 / pairs;
  Integers sum[ROWS][PANEL / LANES];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w; j++) sum[r][j] = (Integers){0} - offsets[r];
  /* The words of one row, or the inputs of several, stay in registers: the compiler keeps the order. */
  const int outer = rows == 1 ? w : pairs, inner = rows == 1 ? pairs : w;
  for (int64_t i = 0; i < count; i++)
    for (int a = 0; a < outer; a++)
      for (int b = 0; b < inner; b++) {
        const int j = rows == 1 ? a : b, k = rows == 1 ? b : a;
        const Words packed = *(const WordsAt *)(words + i * PANEL + j * LANES);
        const Words weights = (packed >> (bits * k)) & (((1u << bits) - 1) * 0x10001u);
        for (int r = 0; r < rows; r++) {
          uint32_t two;
          memcpy(&two, fixed[r] + 2 * (i * pairs + k), 4);
          sum[r][j] = add_products(sum[r][j], weights, (Words){0} + two);
        }
      }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w; j++) {
      FloatsAt *at = (FloatsAt *)(to + r * PANEL + j * LANES);
      const Lanes scale = *(const FloatsAt *)(scales + j * LANES) * steps[r];
      *at += __builtin_convertvector(sum[r][j], Lanes) * scale;
    }
}

/* Outputs ``[rows, PANEL]`` of a panel of integers. */
INLINE void multiply_integers(const Matrix *m, int64_t panel, const int format, const int rows,
                              const int w, const float *x, float *to) {
  const int64_t block = least(INPUT_BLOCK, m->group), n = values_per_word(format);
  const uint32_t *words = (const uint32_t *)(m->values + panel * panel_bytes(format, m->inputs));
  int16_t fixed[ROWS][INPUT_BLOCK];
  int32_t offsets[ROWS];
  float steps[ROWS];
  memset(to, 0, sizeof(float) * rows * PANEL);
  for (int64_t start = 0; start < m->inputs; start += block) {
    const int64_t count = least(block, m->inputs - start);
    const int64_t group = panel * m->groups + start / m->group;
    for (int r = 0; r < rows; r++) {
      steps[r] = to_fixed(x + r * m->inputs + start, count, fixed[r]);
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i++) sum += fixed[r][i];
      offsets[r] = sum * (1 << (32 / n - 1));
    }
    for (int64_t column = 0; column < PANEL; column += w * LANES)
      multiply_words(words + start / n * PANEL + column, m->scales + group * PANEL + column, format,
                     rows, w, divided(count, n), fixed, offsets, steps, to + column);
  }
}

INLINE void multiply_rows(const Matrix *m, int64_t panel, const int format, const int rows,
                          const float *x, float *to) {
  const int w = rows == 1 ? PANEL / LANES : TILE; /* one row has registers to spare */
  if (values_per_word(format) > 1) return multiply_integers(m, panel, format, rows, w, x, to);
  for (int64_t column = 0; column < PANEL; column += w * LANES)
    multiply_tile(m, panel, format, rows, w, column, x, to);
}

INLINE void multiply(const Matrix *m, int64_t panel, const int format, int64_t rows, const float *x,
                     float *to) {
  switch (rows) {
    case 1: return multiply_rows(m, panel, format, 1, x, to);
    case 2: return multiply_rows(m, panel, format, 2, x, to);
    case 3: return multiply_rows(m, panel, format, 3, x, to);
    case 4: return multiply_rows(m, panel, format, 4, x, to);
    case 5: return multiply_rows(m, panel, format, 5, x, to);
    default: return multiply_rows(m, panel, format, ROWS, x, to);
  }
}

static void multiply_float32(const Matrix *m, int64_t p, int64_t rows, const float *x, float *to) {
  multiply(m, p, FLOAT32, rows, x, to);
}
static void multiply_bfloat16(const Matrix *m, int64_t p, int64_t rows, const float *x, float *to) {
  multiply(m, p, BFLOAT16, rows, x, to);
}
static void multiply_int8(const Matrix *m, int64_t p, int64_t rows, const float *x, float *to) {
  multiply(m, p, INT8, rows, x, to);
}
static void multiply_int4(const Matrix *m, int64_t p, int64_t rows, const float *x, float *to) {
  multiply(m, p, INT4, rows, x, to);
}

/* Matrix of arguments i and i + 1; 0 layers: without that axis. */
static inline Matrix matrix_argument(Call *call, int64_t i, const char *name, int format, int64_t layers,
                     int64_t inputs, int64_t outputs) {
  Matrix m = {.inputs = inputs, .outputs = outputs, .panels = divided(outputs, PANEL)};
  m.group = format == INT4 ? GROUP : inputs;
  m.groups = format == INT4 ? divided(inputs, GROUP) : 1;
  const int64_t values[] = {layers, m.panels, divided(inputs, values_per_word(format)), PANEL};
  const int64_t scales[] = {layers, m.panels, m.groups, PANEL};
  const int64_t rank = layers > 0 ? 4 : 3;
  m.values = checked(call, buffer_at(call, 0, i, name), name, format, 0,
                     (Shape){rank, values + 4 - rank});
  m.scales = checked(call, buffer_at(call, 0, i + 1, name), name, XLA_FFI_DataType_F32, 0,
                     (Shape){rank, scales + 4 - rank});
  return m;
}

#endif
