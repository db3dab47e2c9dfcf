/* Matrices ``[in, out]`` as panels of PANEL outputs, in float32 or fewer bits, and their products
   with the vectors of several sequences.

   A matrix is ``values [panels, in, PANEL]``, which one pass reads in order, times
   ``scales [panels, groups, PANEL]`` of groups of inputs. Values are float32, bfloat16 or int8 with
   one group, or int4 (two inputs in ``[panels, in / 2, PANEL]`` bytes) with groups of GROUP inputs.
   Several matrices of one shape have an axis in front. Values of outputs PANEL / 2 (bfloat16)
   or PANEL / 4 apart share 32 bits, the first in the lowest; of int4, 32 bits hold
   four values of an even input, then four of the next. So shifts unpack a whole vector.

   Values of int4 are stored plus 8 and unpacked by a mask, as multiples of a power of two: exact,
   and faster than shifts that extend signs.

   Each output is summed in the order of its inputs: the bits of a sequence's results do not depend
   on how many there are. */

#ifndef SIMPLERNN_PANELS_H
#define SIMPLERNN_PANELS_H

#include "call.h"

#define PANEL 64
#define GROUP 64
#define AHEAD 8192 /* bytes; prefetching outside of an array is safe */
#define ROWS 6 /* sequences whose sums are kept in registers */
#define INLINE static inline __attribute__((always_inline))

/* Vectors of the machine's size, since the compiler spills larger ones. Of TILE of them, the sums of
   ROWS sequences fit the registers. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE 4
#elif defined(__AVX__)
#define LANES 8
#define TILE 2
#else
#define LANES 4
#define TILE 4
#endif

#define VECTOR(type, name) typedef type name __attribute__((vector_size(LANES * sizeof(type))))
#define UNALIGNED(type, name) \
  typedef type name __attribute__((vector_size(LANES * sizeof(type)), aligned(1), may_alias))
VECTOR(float, Lanes);
VECTOR(int32_t, Integers);
VECTOR(uint32_t, Words);
UNALIGNED(float, FloatsAt);
UNALIGNED(uint32_t, WordsAt);

enum { FLOAT32 = XLA_FFI_DataType_F32, BFLOAT16 = XLA_FFI_DataType_BF16 };
enum { INT8 = XLA_FFI_DataType_S8, INT4 = XLA_FFI_DataType_U8 };

typedef struct {
  const char *values;
  const float *scales;
  int64_t inputs, outputs, panels, groups, group;
} Matrix;

/* Bytes of a panel of `inputs`. */
INLINE int64_t panel_bytes(const int format, int64_t inputs) {
  if (format == INT4) return (inputs + 1) / 2 * PANEL;
  return inputs * PANEL * (format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1);
}

/* Values of LANES outputs from `column` of a panel, for input i, divided by `unit_of`. */
INLINE Lanes values_at(const char *panel, const int format, int64_t i, int64_t column) {
  if (format == FLOAT32) return *(const FloatsAt *)(panel + 4 * (i * PANEL + column));
  if (format == BFLOAT16) {
    const Words two = *(const WordsAt *)(panel + 2 * i * PANEL + 4 * (column % (PANEL / 2)));
    return (Lanes)(column < PANEL / 2 ? two << 16 : two & 0xffff0000);
  }
  const char *row = panel + (format == INT8 ? i : i / 2) * PANEL;
  const Words words = *(const WordsAt *)(row + 4 * (column % (PANEL / 4)));
  const int quarter = column / (PANEL / 4);
  if (format == INT8)
    return __builtin_convertvector((Integers)(words << (24 - 8 * quarter)) >> 24, Lanes);
  const Integers nibbles = (Integers)((words >> (16 * (i % 2))) & (15u << (4 * quarter)));
  return __builtin_convertvector(nibbles - (8 << (4 * quarter)), Lanes);
}

INLINE float unit_of(const int format, int64_t column) {
  return format == INT4 ? 1.0f / (1 << (4 * (column / (PANEL / 4)))) : 1;
}

/* Outputs ``[rows, w * LANES]`` from `column` of a panel. */
INLINE void multiply_tile(const Matrix *m, int64_t panel, const int format, const int rows,
                          const int w, int64_t column, const float *x, float *to) {
  const char *values = m->values + panel * panel_bytes(format, m->inputs);
  const float *scales = m->scales + panel * m->groups * PANEL + column;
  Lanes total[ROWS][PANEL / LANES];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w; j++) total[r][j] = (Lanes){0};
  for (int64_t g = 0; g < m->groups; g++, scales += PANEL) {
    Lanes sum[ROWS][PANEL / LANES];
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < w; j++) sum[r][j] = (Lanes){0};
    const int64_t end = least((g + 1) * m->group, m->inputs);
    for (int64_t i = g * m->group; i < end; i++) {
      /* One row: measured 1.4 times the rate of int8 from memory; of other formats no gain. */
      if (rows == 1 && format == INT8) __builtin_prefetch(values + i * PANEL + AHEAD);
      Lanes weights[PANEL / LANES];
      for (int j = 0; j < w; j++) weights[j] = values_at(values, format, i, column + j * LANES);
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < w; j++) sum[r][j] += weights[j] * x[r * m->inputs + i];
    }
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < w; j++) {
        const float unit = unit_of(format, column + j * LANES);
        total[r][j] += sum[r][j] * unit * *(const FloatsAt *)(scales + j * LANES);
      }
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w; j++) *(FloatsAt *)(to + r * PANEL + column + j * LANES) = total[r][j];
}

INLINE void multiply_rows(const Matrix *m, int64_t panel, const int format, const int rows,
                          const float *x, float *to) {
  const int w = rows == 1 ? PANEL / LANES : TILE; /* one row has registers to spare */
#pragma GCC unroll 4
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
  const int64_t values[] = {layers, m.panels, format == INT4 ? divided(inputs, 2) : inputs, PANEL};
  const int64_t scales[] = {layers, m.panels, m.groups, PANEL};
  const int64_t rank = layers > 0 ? 4 : 3;
  m.values = checked(call, buffer_at(call, 0, i, name), name, format, 0,
                     (Shape){rank, values + 4 - rank});
  m.scales = checked(call, buffer_at(call, 0, i + 1, name), name, XLA_FFI_DataType_F32, 0,
                     (Shape){rank, scales + 4 - rank});
  return m;
}

#endif
