/* Products of packed operands, with sums in float32: of bfloat16 where the processor multiplies it fast,
   otherwise of float32.

   The left operand is rows of groups [m, groups], a group being the entries along the contracted axis
   that one instruction multiplies; the right one is panels [n / COLUMNS, groups, COLUMNS]. */

#ifndef SIMPLERNN_MATMUL_H
#define SIMPLERNN_MATMUL_H

/* FAST_BFLOAT16: by `has_fast_bfloat16` in `native.py`, since not all processors gain by it. */
#if defined(FAST_BFLOAT16) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BFLOAT16 1
#include <immintrin.h>
#endif
#if defined(HAS_BFLOAT16) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "call.h"
#include "vectors.h"

#define ROWS (REGISTERS / 4)
#define COLUMNS (2 * LANES) /* a tile of ROWS x COLUMNS sums fits the registers */
#define TILE_ROWS 32        /* of AMX, two registers of 16 rows */

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __clang__
#define pick __builtin_shufflevector
#else /* gcc has it from version 12 on */
typedef int32_t FourInts __attribute__((vector_size(16)));
#define pick(x, y, i, j, k, l) __builtin_shuffle(x, y, (FourInts){i, j, k, l})
#endif

/* Entries of an operand that are consecutive along the contracted axis: two of bfloat16, or one of
   float32. */
typedef uint32_t __attribute__((may_alias)) Group;
#ifdef HAS_BFLOAT16
#define GROUP 2
#define GROUPS 16 /* contracted by one instruction */
#else
#define GROUP 1
#define GROUPS 1
#endif

static inline int64_t rounded_up(int64_t n, int64_t to) { return divided(n, to) * to; }

/* Groups of k entries, filled up with zeros. */
static inline int64_t groups_of(int64_t k) { return rounded_up(divided(k, GROUP), GROUPS); }

#ifdef HAS_BFLOAT16
INLINE __mmask16 lanes(int64_t n) { return n < LANES ? (1 << n) - 1 : -1; }

INLINE void store_rounded(uint16_t *to, __m512 x, __mmask16 inside) {
  _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Round a matrix, m x k, to rows of groups, `stride` groups apart, filled up with zeros. */
static void round_rows(Group *to, int64_t stride, const float *from, int64_t m, int64_t k) {
  const int64_t groups = groups_of(k);
  for (int64_t i = 0; i < m; i++, from += k, to += stride) {
    memset(to + k / GROUP, 0, sizeof(Group) * (groups - k / GROUP));
    for (int64_t j = 0; j < k; j += LANES) {
      const __mmask16 inside = lanes(k - j);
      store_rounded((uint16_t *)to + j, _mm512_maskz_loadu_ps(inside, from + j), inside);
    }
  }
}
#endif

/* To rows of groups [m, groups_of(k)] from a matrix, m x k. */
static inline void pack_rows(Group *to, const float *from, int64_t m, int64_t k) {
#ifdef HAS_BFLOAT16
  round_rows(to, groups_of(k), from, m, k);
#else
  memcpy(to, from, sizeof(float) * m * k);
#endif
}

/* And back. */
static inline void unpack_rows(float *to, const Group *from, int64_t m, int64_t k) {
#ifdef HAS_BFLOAT16
  for (int64_t i = 0; i < m; i++, to += k, from += groups_of(k))
    for (int64_t j = 0; j < k; j++) {
      const uint32_t bits = (uint32_t)((const uint16_t *)from)[j] << 16;
      memcpy(to + j, &bits, sizeof bits);
    }
#else
  memcpy(to, from, sizeof(float) * m * k);
#endif
}

#ifdef HAS_BFLOAT16
/* to = from^T, of LANES x LANES entries of 32 bits. */
static inline void transpose_square(float *to, int64_t to_stride, const float *from, int64_t from_stride) {
  __m512 x[LANES], y[LANES];
  for (int i = 0; i < LANES; i++) x[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d a = (__m512d)y[i + j], b = (__m512d)y[i + j + 2];
      x[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
      x[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
  for (int i = 0; i < LANES; i += 8)
    for (int j = 0; j < 4; j++) {
      y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(y[j], y[j + 8], 0x88));
    _mm512_storeu_ps(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(y[j], y[j + 8], 0xdd));
  }
}
#endif

/* to = from^T, of m x n entries of 32 bits, rows `to_stride` and `from_stride` apart. */
static void transpose(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t m, int64_t n) {
#ifdef HAS_BFLOAT16
  if (m % LANES == 0 && n % LANES == 0) {
    for (int64_t i = 0; i < m; i += LANES)
      for (int64_t j = 0; j < n; j += LANES)
        transpose_square(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
    return;
  }
#endif
  const int64_t rows = m / 4 * 4, columns = n / 4 * 4;
  for (int64_t i = 0; i < rows; i += 4)
    for (int64_t j = 0; j < columns; j += 4) {
      const float *x = from + i * from_stride + j;
      float *y = to + j * to_stride + i;
      const Four x0 = *(const Four *)x, x1 = *(const Four *)(x + from_stride);
      const Four x2 = *(const Four *)(x + 2 * from_stride), x3 = *(const Four *)(x + 3 * from_stride);
      const Four low01 = pick(x0, x1, 0, 4, 1, 5);
      const Four high01 = pick(x0, x1, 2, 6, 3, 7);
      const Four low23 = pick(x2, x3, 0, 4, 1, 5);
      const Four high23 = pick(x2, x3, 2, 6, 3, 7);
      *(Four *)y = pick(low01, low23, 0, 1, 4, 5);
      *(Four *)(y + to_stride) = pick(low01, low23, 2, 3, 6, 7);
      *(Four *)(y + 2 * to_stride) = pick(high01, high23, 0, 1, 4, 5);
      *(Four *)(y + 3 * to_stride) = pick(high01, high23, 2, 3, 6, 7);
    }
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = i < rows ? columns : 0; j < n; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

/* From rows of groups [n, groups] to panels [n / COLUMNS, groups, COLUMNS]. */
static inline void to_panels(Group *panels, const Group *rows, int64_t n, int64_t groups) {
  const float *from = (const float *)rows;
  float *to = (float *)panels;
  for (int64_t i = 0; i < n; i += COLUMNS)
    transpose(to + i * groups, COLUMNS, from + i * groups, groups, least(COLUMNS, n - i), groups);
}

/* From rows of groups of a matrix, m x k and `stride` groups apart, to the panels of its transpose,
   `panel` groups apart. */
static inline void to_panels_of_transpose(Group *to, int64_t panel, const Group *from, int64_t stride,
                                          int64_t m, int64_t k) {
  const int64_t groups = groups_of(m), row = stride * GROUP;
  for (int64_t first = 0; first < k; first += COLUMNS, to += panel)
    for (int64_t j = 0; j < groups; j++)
#ifdef HAS_BFLOAT16
    {
      static const uint16_t zeros[COLUMNS];
      const uint16_t *entries = (const uint16_t *)from + first;
      const uint16_t *even = 2 * j < m ? entries + 2 * j * row : zeros;
      const uint16_t *odd = 2 * j + 1 < m ? entries + (2 * j + 1) * row : zeros;
      Group *pairs = to + j * COLUMNS;
      for (int64_t i = 0; i < COLUMNS; i += LANES) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + i)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(odd + i)));
        _mm512_storeu_si512(pairs + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
#else
      if (k - first >= COLUMNS) /* faster with a constant size */
        memcpy(to + j * COLUMNS, from + j * row + first, sizeof(Group) * COLUMNS);
      else
        memcpy(to + j * COLUMNS, from + j * row + first, sizeof(Group) * (k - first));
#endif
}

/* Add to sums [ROWS, COLUMNS] the products of `groups` groups of ROWS rows, `stride` groups apart, and of
   the columns of a panel. */
static inline void multiply_rows(const Group *p, int64_t stride, const Group *q, int64_t groups, float *sums) {
  Lanes tile[ROWS][2];
  memcpy(tile, sums, sizeof tile);
  for (int64_t j = 0; j < groups; j++, q += COLUMNS) {
    const Lanes left = ((const FloatsAt *)q)[0], right = ((const FloatsAt *)q)[1];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
#ifdef HAS_BFLOAT16
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(p[i * stride + j]);
      tile[i][0] = _mm512_dpbf16_ps(tile[i][0], pair, (__m512bh)left);
      tile[i][1] = _mm512_dpbf16_ps(tile[i][1], pair, (__m512bh)right);
#else
      float factor;
      memcpy(&factor, p + i * stride + j, sizeof factor);
      tile[i][0] += factor * left;
      tile[i][1] += factor * right;
#endif
    }
  }
  memcpy(sums, tile, sizeof tile);
}

#ifdef HAS_AMX
/* Ask Linux for the tile registers, once: a process computes all matrices alike. */
static int has_tiles(void) {
  enum { REQUEST = 0x1023, TILE_DATA = 18, UNKNOWN = 0, REFUSED, GRANTED };
  static atomic_int answer = UNKNOWN;
  if (atomic_load(&answer) == UNKNOWN) {
    int unknown = UNKNOWN;
    const int granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    atomic_compare_exchange_strong(&answer, &unknown, granted ? GRANTED : REFUSED);
  }
  return atomic_load(&answer) == GRANTED;
}

static void set_up_tiles(void) {
  static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } tiles = {1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&tiles);
}

/* multiply_rows for TILE_ROWS rows of sums, `width` entries apart. */
static inline void multiply_tile(const Group *p, int64_t stride, const Group *q, int64_t groups, float *sums,
                                 int64_t width, int is_first) {
  __asm__ volatile("" ::: "memory"); /* what tiles load is stored before */
  float *lower = sums + 16 * width;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 4 * width);
    _tile_loadd(1, sums + 16, 4 * width);
    _tile_loadd(2, lower, 4 * width);
    _tile_loadd(3, lower + 16, 4 * width);
  }
  for (int64_t j = 0; j < groups; j += GROUPS) {
    _tile_loadd(4, p + j, 4 * stride);
    _tile_loadd(5, p + j + 16 * stride, 4 * stride);
    _tile_loadd(6, q + j * COLUMNS, 4 * COLUMNS);
    _tile_loadd(7, q + j * COLUMNS + 16, 4 * COLUMNS);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * width);
  _tile_stored(1, sums + 16, 4 * width);
  _tile_stored(2, lower, 4 * width);
  _tile_stored(3, lower + 16, 4 * width);
}
#else
#define has_tiles() 0
#define set_up_tiles()
#define _tile_release()
#endif

/* The products of TILE_ROWS rows, or ROWS of them without tiles, in sums [rows, COLUMNS]. */
static inline void multiply_panel(const Group *p, const Group *q, int64_t groups, float *sums, int tiles) {
#ifdef HAS_AMX
  if (tiles) {
    multiply_tile(p, groups, q, groups, sums, COLUMNS, 1);
    return;
  }
#endif
  memset(sums, 0, sizeof(float) * ROWS * COLUMNS);
  multiply_rows(p, groups, q, groups, sums);
}

#endif
