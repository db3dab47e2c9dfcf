/* Newton-Schulz iterations toward the orthogonal polar factors of matrices.

   Of each matrix M, r x c with r <= c (transposed if not), with X = M / (|M| + 1e-8) and five times

     A = X X^T      B = b A + c A A      X = a X + B X

   where a, b, c are `COEFFICIENTS`. As XLA's operations, of which there are some 15 per matrix,
   `base` takes 1.4 times as long to its first step, and 2 to 4 % longer per step.

   With AMX, which multiplies bfloat16 some ten times as fast as float32, operands are rounded to
   bfloat16, as in the reference implementation of Muon; sums and X are float32. Threads take whole
   matrices, and one thread computes a matrix in one order: results are deterministic.

   Arguments and results are the same number of float32 arrays [..., m, n], row-major. */

#define _GNU_SOURCE /* for syscall */
#include <math.h>
#include <string.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "call.h"
#include "vectors.h"

static const float COEFFICIENTS[3] = {3.4445f, -4.7750f, 2.0315f};
#define ITERATIONS 5
#define ENTRIES_PER_THREAD 2048
#define SQUARES 4

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
#ifdef HAS_AMX
#define GROUP 2
#define GROUPS 16 /* contracted by one instruction */
#else
#define GROUP 1
#define GROUPS 1
#endif

static inline int64_t rounded_up(int64_t n, int64_t to) { return divided(n, to) * to; }

/* Groups of k entries, filled up with zeros. */
static inline int64_t groups_of(int64_t k) { return rounded_up(divided(k, GROUP), GROUPS); }

/* Rows of groups [m, groups_of(k)] of a matrix, m x k: in `memory`, or the matrix itself. */
static Group *rows_of(Group *memory, const float *from, int64_t m, int64_t k) {
#ifndef HAS_AMX
  return (Group *)from;
#else
  const int64_t groups = groups_of(k);
  Group *to = memory;
  for (int64_t i = 0; i < m; i++, from += k, to += groups) {
    memset(to + k / GROUP, 0, sizeof(Group) * (groups - k / GROUP));
    for (int64_t j = 0; j < k; j += LANES) {
      const __mmask16 inside = k - j < LANES ? (1 << (k - j)) - 1 : -1;
      const __m512 x = _mm512_maskz_loadu_ps(inside, from + j);
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
      _mm256_mask_storeu_epi16((uint16_t *)to + j, inside, rounded);
    }
  }
  return memory;
#endif
}

/* to = from^T, of m x n entries of 32 bits, rows `to_stride` and `from_stride` apart. */
static void transpose(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t m, int64_t n) {
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
static void to_panels(Group *panels, const Group *rows, int64_t n, int64_t groups) {
  const float *from = (const float *)rows;
  float *to = (float *)panels;
  for (int64_t i = 0; i < n; i += COLUMNS)
    transpose(to + i * groups, COLUMNS, from + i * groups, groups, least(COLUMNS, n - i), groups);
}

/* From rows of groups of a matrix, m x k, to the panels of its transpose. */
static void to_panels_of_transpose(Group *to, const Group *from, int64_t m, int64_t k) {
  const int64_t stride = groups_of(k) * GROUP, groups = groups_of(m);
  for (int64_t first = 0; first < k; first += COLUMNS)
    for (int64_t j = 0; j < groups; j++, to += COLUMNS)
#ifdef HAS_AMX
    {
      static const uint16_t zeros[COLUMNS];
      const uint16_t *entries = (const uint16_t *)from + first;
      const uint16_t *even = 2 * j < m ? entries + 2 * j * stride : zeros;
      const uint16_t *odd = 2 * j + 1 < m ? entries + (2 * j + 1) * stride : zeros;
      for (int64_t i = 0; i < COLUMNS; i++) to[i] = even[i] | (Group)odd[i] << 16;
    }
#else
      if (k - first >= COLUMNS) /* faster with a constant size */
        memcpy(to, from + j * stride + first, sizeof(Group) * COLUMNS);
      else
        memcpy(to, from + j * stride + first, sizeof(Group) * (k - first));
#endif
}

/* Sums of ROWS rows, `groups` apart, times the columns of a panel. */
static void multiply_rows(const Group *p, const Group *q, int64_t groups, float *sums) {
  Lanes tile[ROWS][2] = {0};
  for (int64_t j = 0; j < groups; j++, q += COLUMNS) {
    const Lanes left = ((const FloatsAt *)q)[0], right = ((const FloatsAt *)q)[1];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
#ifdef HAS_AMX
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(p[i * groups + j]);
      tile[i][0] = _mm512_dpbf16_ps(tile[i][0], pair, (__m512bh)left);
      tile[i][1] = _mm512_dpbf16_ps(tile[i][1], pair, (__m512bh)right);
#else
      float factor;
      memcpy(&factor, p + i * groups + j, sizeof factor);
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

/* multiply_rows for TILE_ROWS rows. */
static void multiply_tile(const Group *p, const Group *q, int64_t groups, float *sums) {
  __asm__ volatile("" ::: "memory"); /* what tiles load is stored before */
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t j = 0; j < groups; j += GROUPS) {
    _tile_loadd(4, p + j, 4 * groups);
    _tile_loadd(5, p + j + 16 * groups, 4 * groups);
    _tile_loadd(6, q + j * COLUMNS, 4 * COLUMNS);
    _tile_loadd(7, q + j * COLUMNS + 16, 4 * COLUMNS);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * COLUMNS);
  _tile_stored(1, sums + 16, 4 * COLUMNS);
  _tile_stored(2, sums + 16 * COLUMNS, 4 * COLUMNS);
  _tile_stored(3, sums + 16 * COLUMNS + 16, 4 * COLUMNS);
}
#else
#define has_tiles() 0
#define set_up_tiles()
#define _tile_release()
#define multiply_tile multiply_rows
#endif

/* to = by_old old + by_product P Q, for rows of P, m x k, and panels of Q, k x n; `old` and `to` are
   m x n, and the same or apart. If the product is symmetric, what is above the diagonal is computed
   and mirrored; to compute it all with tiles takes less time. */
static void multiply(float *to, const float *old, float by_old, float by_product, const Group *p,
                     const Group *q, int64_t m, int64_t n, int64_t k, int is_symmetric, int tiles) {
  float sums[TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
  const int64_t groups = groups_of(k), height = tiles ? TILE_ROWS : ROWS;
  const int is_mirrored = is_symmetric && !tiles;
  for (int64_t column = 0; column < n; column += COLUMNS)
    for (int64_t row = 0; row < m; row += height) {
      if (is_mirrored && row >= column + COLUMNS) break;
      const Group *rows = p + row * groups, *panel = q + column * groups;
      if (tiles)
        multiply_tile(rows, panel, groups, sums);
      else
        multiply_rows(rows, panel, groups, sums);
      const int64_t width = least(COLUMNS, n - column);
      for (int64_t i = 0; i < least(height, m - row); i++) {
        const int64_t start = (row + i) * n + column;
        for (int64_t j = 0; j < width; j++)
          to[start + j] = by_old * old[start + j] + by_product * sums[i * COLUMNS + j];
      }
    }
  if (is_mirrored) /* except the blocks of the diagonal, which are complete */
    for (int64_t row = 0; row < m; row += COLUMNS)
      for (int64_t column = row + COLUMNS; column < n; column += COLUMNS)
        transpose(to + column * n + row, n, to + row * n + column, n, COLUMNS, least(COLUMNS, n - column));
}

/* Groups of an operand m x k, as rows or panels, and beyond it what tiles may read. */
static int64_t groups_for(int64_t m, int64_t k) {
  return rounded_up(m, TILE_ROWS) * groups_of(k);
}

/* Scratch memory of an r x c matrix: r x r matrices, and operands of any product. */
typedef struct {
  float *squares[SQUARES];
  Group *left, *right, *x_panels;
} Scratch;

static Scratch split(float *memory, int64_t r, int64_t c) {
  Scratch scratch;
  memset(memory, 0, sizeof(float) * SQUARES * r * r);
  for (int i = 0; i < SQUARES; i++, memory += r * r) scratch.squares[i] = memory;
  Group *free = (Group *)memory + (-(uintptr_t)memory % 64) / sizeof(Group);
  const int64_t size = groups_for(r, c);
  scratch.left = free;
  scratch.right = free + size;
  scratch.x_panels = free + 2 * size;
  return scratch;
}

/* to = X X^T, the Gram matrix, of the rows of X. */
static void gram(float *to, const Group *rows, int64_t r, int64_t c, const Scratch *s, int tiles) {
  to_panels(s->right, rows, r, groups_of(c));
  multiply(to, to, 0, 1, rows, s->right, r, r, c, 1, tiles);
}

/* to = by_old old + by_product P Q, of symmetric matrices that commute: so the product is, too. */
static void multiply_symmetric(float *to, const float *old, float by_old, float by_product, const float *p,
                               const float *q, int64_t r, const Scratch *s, int tiles) {
  /* Q is its own transpose, and this is faster. */
  to_panels_of_transpose(s->right, rows_of(s->left, q, r, r), r, r);
  multiply(to, old, by_old, by_product, rows_of(s->left, p, r, r), s->right, r, r, r, 1, tiles);
}

static void iterate(float *x, int64_t r, int64_t c, const Scratch *s) {
  float *a = s->squares[0], *b = s->squares[1];
  const int tiles = has_tiles();
  if (tiles) set_up_tiles();
  for (int i = 0; i < ITERATIONS; i++) {
    const Group *rows = rows_of(s->left, x, r, c);
    gram(a, rows, r, c, s, tiles);
    to_panels_of_transpose(s->x_panels, rows, r, c);
    multiply_symmetric(b, a, COEFFICIENTS[1], COEFFICIENTS[2], a, a, r, s, tiles);
    multiply(x, x, COEFFICIENTS[0], 1, rows_of(s->left, b, r, r), s->x_panels, r, c, r, 0, tiles);
  }
  if (tiles) _tile_release();
}

/* The same in half the operations, if c >= 2 r. An iteration is X <- Q X with Q = a I + b A + c A A, so
   that A becomes Q A Q. All Q are polynomials of the first A: they commute. X is multiplied once, by
   their product P. Rounding errors of A grow with each Q, up to twelvefold: float32 leaves room for
   that, operands in bfloat16 do not. */
static void iterate_gram(float *x, int64_t r, int64_t c, const Scratch *s) {
  float *a = s->squares[0], *q = s->squares[1], *p = s->squares[2], *next = s->squares[3];
  const Group *rows = rows_of(s->left, x, r, c);
  gram(a, rows, r, c, s, 0);
  for (int i = 0; i < ITERATIONS; i++) {
    multiply_symmetric(q, a, COEFFICIENTS[1], COEFFICIENTS[2], a, a, r, s, 0);
    for (int64_t j = 0; j < r; j++) q[j * r + j] += COEFFICIENTS[0];
    if (i == 0) {
      memcpy(p, q, sizeof(float) * r * r);
    } else {
      multiply_symmetric(next, next, 0, 1, q, p, r, s, 0);
      float *product = next;
      next = p;
      p = product;
    }
    if (i == ITERATIONS - 1) break;
    multiply_symmetric(next, next, 0, 1, q, a, r, s, 0);
    multiply_symmetric(a, a, 0, 1, next, q, r, s, 0);
  }
  to_panels_of_transpose(s->x_panels, rows, r, c);
  multiply(x, x, 0, 1, rows_of(s->left, p, r, r), s->x_panels, r, c, r, 0, 0);
}

/* Entries of the scratch memory of an r x c matrix: X, and what `split` takes. */
static int64_t entries_for(int64_t r, int64_t c) {
  const int64_t operands = 2 * groups_for(r, c) + groups_for(c, r);
  return r * c + SQUARES * r * r + operands + 32;
}

static int64_t num_rows(const XLA_FFI_Buffer *x) { return x->dims[x->rank - 2]; }
static int64_t num_columns(const XLA_FFI_Buffer *x) { return x->dims[x->rank - 1]; }

static int64_t matrices_in(const XLA_FFI_Buffer *x) {
  return entries_of(x) / (num_rows(x) * num_columns(x));
}

static void run(const void *task, int64_t item, void *scratch) {
  const XLA_FFI_CallFrame *frame = task;
  const XLA_FFI_Buffer *const *matrices = (const XLA_FFI_Buffer *const *)frame->args.args;
  int64_t i = 0;
  for (; item >= matrices_in(matrices[i]); i++) item -= matrices_in(matrices[i]);
  const int64_t m = num_rows(matrices[i]), n = num_columns(matrices[i]);
  const float *from = (const float *)matrices[i]->data + item * m * n;
  const XLA_FFI_Buffer *result = frame->rets.rets[i];
  float *to = (float *)result->data + item * m * n, *x = scratch;
  const int64_t r = least(m, n), c = m + n - r;
  double sum = 0;
  for (int64_t j = 0; j < m * n; j++) sum += (double)from[j] * from[j];
  const float scale = 1 / ((float)sqrt(sum) + 1e-8f);
  if (m > n)
    transpose(x, c, from, n, m, n);
  else
    memcpy(x, from, sizeof(float) * m * n);
  for (int64_t j = 0; j < m * n; j++) x[j] *= scale;
  const Scratch squares_and_operands = split(x + r * c, r, c);
  if (GROUP == 1 && c >= 2 * r)
    iterate_gram(x, r, c, &squares_and_operands);
  else
    iterate(x, r, c, &squares_and_operands);
  if (m > n)
    transpose(to, n, x, c, r, c);
  else
    memcpy(to, x, sizeof(float) * m * n);
}

XLA_FFI_Error *simplernn_newton_schulz(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int64_t count = frame->args.size;
  Call call = begin(frame, "simplernn_newton_schulz", "matrix", 2, count, count);
  int64_t items = 0, size = 0, scratch = 0;
  for (int64_t i = 0; is_valid(&call) && i < count; i++) {
    const XLA_FFI_Buffer *x = buffer_at(&call, 0, i, "matrix");
    if (x == NULL) break;
    if (x->rank < 2) {
      reject(&call, "simplernn_newton_schulz: matrix: expected at least 2 axes; got %lld", (long long)x->rank);
      break;
    }
    call.num_leading = 0;
    const Shape shape = {x->rank, x->dims};
    argument(&call, i, "matrix", shape);
    result(&call, i, "result", shape);
    reject_empty(&call, entries_of(x));
    if (!is_valid(&call)) break;
    const int64_t r = least(num_rows(x), num_columns(x));
    items += matrices_in(x);
    const int64_t needed = entries_for(r, num_rows(x) + num_columns(x) - r);
    if (needed > scratch) scratch = needed;
    size += entries_of(x);
  }
  const Work work = {.task = frame, .run = run, .items = items,
                     .threads = 1 + size / ENTRIES_PER_THREAD,
                     .scratch_bytes = scratch_for(scratch, sizeof(float))};
  return share(&call, &work);
}
