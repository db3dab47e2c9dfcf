/* Newton-Schulz iterations toward the orthogonal polar factors of matrices.

   Of each matrix M, r x c with r <= c (transposed if not), with X = M / (|M| + 1e-8) and for the factors
   a, b, c of each iteration

     A = X X^T      B = b A + c A A      X = a X + B X

   As XLA's operations, of which there are some 15 per matrix, `base` takes 1.4 times as long to its
   first step, and 2 to 4 % longer per step.

   Where the processor multiplies bfloat16 fast (`matmul.h`), X, A and B are rounded to it, as in the
   reference implementation of Muon; sums are float32. Threads take whole matrices, and one thread
   computes a matrix in one order: results are deterministic.

   Arguments and results are the same number of float32 arrays [..., m, n], row-major. */

#define _GNU_SOURCE /* for syscall */
#include <math.h>
#include <string.h>

#include "call.h"
#include "matmul.h"

#define ITERATIONS 3
static const float COEFFICIENTS[ITERATIONS][3] = {
    {7.7080f, -20.4042f, 13.6695f}, {3.4634f, -2.3513f, 0.4204f}, {2.6613f, -1.9772f, 0.4526f}};
#define ENTRIES_PER_THREAD 2048
#define MIRRORED 256 /* rows of a symmetric matrix of bfloat16 of which half is computed */

/* to = by_old old + by_product sums, of `width` entries, COLUMNS at most. */
INLINE void combine(Group *to, const Group *old, const float *sums, int64_t width, float by_old, float by_product) {
#ifdef HAS_BFLOAT16
  for (int64_t j = 0; j < width; j += LANES) {
    const __mmask16 inside = lanes(width - j);
    const __m256i bits = _mm256_maskz_loadu_epi16(inside, (const uint16_t *)old + j);
    const __m512 past = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    const __m512 sum = _mm512_mul_ps(_mm512_set1_ps(by_product), _mm512_loadu_ps(sums + j));
    store_rounded((uint16_t *)to + j, _mm512_fmadd_ps(_mm512_set1_ps(by_old), past, sum), inside);
  }
#else
  for (int64_t j = 0; j < width; j++)
    ((float *)to)[j] = by_old * ((const float *)old)[j] + by_product * sums[j];
#endif
}

/* Copy the block of COLUMNS x `width` entries at row `i`, column `j` of a symmetric matrix to its mirror
   image. */
INLINE void mirror(Group *matrix, int64_t stride, int64_t i, int64_t j, int64_t width) {
#ifdef HAS_BFLOAT16
  uint16_t *from = (uint16_t *)matrix + i * stride + j, *to = (uint16_t *)matrix + j * stride + i;
  for (int64_t column = 0; column < width; column++)
    for (int64_t row = 0; row < COLUMNS; row++) to[column * stride + row] = from[row * stride + column];
#else
  float *from = (float *)matrix + i * stride + j, *to = (float *)matrix + j * stride + i;
  transpose(to, stride, from, stride, COLUMNS, width);
#endif
}

/* to = by_old old + by_product P Q, for rows of P, m x k, and panels of Q, k x n; `old` and `to` are rows
   of m x n, and the same or apart. If the product is symmetric, what is above the diagonal is computed
   and mirrored; of small matrices of bfloat16, to compute it all takes less time. */
static void multiply(Group *to, const Group *old, float by_old, float by_product, const Group *p,
                     const Group *q, int64_t m, int64_t n, int64_t k, int is_symmetric, int tiles) {
  float sums[TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
  const int64_t groups = groups_of(k), stride = groups_of(n), height = tiles ? TILE_ROWS : ROWS;
  const int is_mirrored = is_symmetric && (GROUP == 1 || n >= MIRRORED);
  for (int64_t column = 0; column < n; column += COLUMNS)
    for (int64_t row = 0; row < m; row += height) {
      if (is_mirrored && row >= column + COLUMNS) break;
      multiply_panel(p + row * groups, q + column * groups, groups, sums, tiles);
      for (int64_t i = 0; i < least(height, m - row); i++) {
        const int64_t start = (row + i) * stride + column / GROUP;
        combine(to + start, old + start, sums + i * COLUMNS, least(COLUMNS, n - column), by_old, by_product);
      }
    }
  if (is_mirrored) /* except the blocks of the diagonal, which are complete */
    for (int64_t row = 0; row < m; row += COLUMNS)
      for (int64_t column = row + COLUMNS; column < n; column += COLUMNS)
        mirror(to, GROUP * stride, row, column, least(COLUMNS, n - column));
}

/* Groups of an operand m x k, as rows or panels, and beyond it what tiles may read. */
static int64_t groups_for(int64_t m, int64_t k) {
  return rounded_up(m, TILE_ROWS) * groups_of(k);
}

/* The matrix and what its iterations need: r x r matrices, and the right operand of a product. */
#define SQUARES (GROUP == 1 ? 4 : 2)
typedef struct {
  Group *x, *squares[4], *right;
} Scratch;

static int64_t groups_of_right(int64_t r, int64_t c) {
  const int64_t gram = groups_for(r, c), other = groups_for(c, r);
  return gram > other ? gram : other;
}

static int64_t scratch_groups(int64_t r, int64_t c) {
  return groups_for(r, c) + SQUARES * groups_for(r, r) + groups_of_right(r, c) + 16;
}

static Scratch split(Group *memory, int64_t r, int64_t c) {
  Scratch s;
  memory += (-(uintptr_t)memory % 64) / sizeof(Group);
  s.x = memory;
  memory += groups_for(r, c);
  memset(memory, 0, sizeof(Group) * SQUARES * groups_for(r, r));
  for (int i = 0; i < SQUARES; i++, memory += groups_for(r, r)) s.squares[i] = memory;
  s.right = memory;
  return s;
}

/* to = X X^T, the Gram matrix. */
static void gram(Group *to, int64_t r, int64_t c, const Scratch *s, int tiles) {
  to_panels(s->right, s->x, r, groups_of(c));
  multiply(to, to, 0, 1, s->x, s->right, r, r, c, 1, tiles);
}

/* to = by_old old + by_product P Q, of symmetric matrices that commute: so the product is, too. */
static void multiply_symmetric(Group *to, const Group *old, float by_old, float by_product, const Group *p,
                               const Group *q, int64_t r, const Scratch *s, int tiles) {
  /* Q is its own transpose, and this is faster. */
  to_panels_of_transpose(s->right, groups_of(r) * COLUMNS, q, groups_of(r), r, r);
  multiply(to, old, by_old, by_product, p, s->right, r, r, r, 1, tiles);
}

/* X = by_old X + P X. */
static void multiply_x(float by_old, const Group *p, int64_t r, int64_t c, const Scratch *s, int tiles) {
  to_panels_of_transpose(s->right, groups_of(r) * COLUMNS, s->x, groups_of(c), r, c);
  multiply(s->x, s->x, by_old, 1, p, s->right, r, c, r, 0, tiles);
}

static void iterate(int64_t r, int64_t c, const Scratch *s) {
  Group *a = s->squares[0], *b = s->squares[1];
  const int tiles = has_tiles();
  if (tiles) set_up_tiles();
  for (int i = 0; i < ITERATIONS; i++) {
    gram(a, r, c, s, tiles);
    multiply_symmetric(b, a, COEFFICIENTS[i][1], COEFFICIENTS[i][2], a, a, r, s, tiles);
    multiply_x(COEFFICIENTS[i][0], b, r, c, s, tiles);
  }
  if (tiles) _tile_release();
}

/* The same in half the operations, if c >= 2 r. An iteration is X <- Q X with Q = a I + b A + c A A, so
   that A becomes Q A Q. All Q are polynomials of the first A: they commute. X is multiplied once, by
   their product P. Rounding errors of A grow with each Q, up to 64-fold: float32 leaves room for that,
   bfloat16 does not. */
static void iterate_gram(int64_t r, int64_t c, const Scratch *s) {
  Group *a = s->squares[0], *q = s->squares[1], *p = s->squares[2], *next = s->squares[3];
  gram(a, r, c, s, 0);
  for (int i = 0; i < ITERATIONS; i++) {
    multiply_symmetric(q, a, COEFFICIENTS[i][1], COEFFICIENTS[i][2], a, a, r, s, 0);
    for (int64_t j = 0; j < r; j++) ((float *)q)[j * r + j] += COEFFICIENTS[i][0];
    if (i == 0) {
      memcpy(p, q, sizeof(float) * r * r);
    } else {
      multiply_symmetric(next, next, 0, 1, q, p, r, s, 0);
      Group *product = next;
      next = p;
      p = product;
    }
    if (i == ITERATIONS - 1) break;
    multiply_symmetric(next, next, 0, 1, q, a, r, s, 0);
    multiply_symmetric(a, a, 0, 1, next, q, r, s, 0);
  }
  multiply_x(0, p, r, c, s, 0);
}

static float norm(const float *x, int64_t n) {
  double lanes[SUMS] = {0}, sum = 0; /* independent: one would be bound by the latency of additions */
  int64_t i = 0;
  for (; i + SUMS <= n; i += SUMS)
    for (int j = 0; j < SUMS; j++) lanes[j] += (double)x[i + j] * x[i + j];
  for (; i < n; i++) sum += (double)x[i] * x[i];
  for (int j = 0; j < SUMS; j++) sum += lanes[j];
  return (float)sqrt(sum);
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
  const float scale = 1 / (norm(from, m * n) + 1e-8f);
  if (m > n)
    transpose(x, c, from, n, m, n);
  else
    memcpy(x, from, sizeof(float) * m * n);
  for (int64_t j = 0; j < m * n; j++) x[j] *= scale;
  const Scratch s = split((Group *)(x + r * c), r, c);
  pack_rows(s.x, x, r, c);
  if (GROUP == 1 && c >= 2 * r)
    iterate_gram(r, c, &s);
  else
    iterate(r, c, &s);
  unpack_rows(x, s.x, r, c);
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
    const int64_t c = num_rows(x) + num_columns(x) - r, needed = r * c + scratch_groups(r, c);
    if (needed > scratch) scratch = needed;
    size += entries_of(x);
  }
  const Work work = {.task = frame, .run = run, .items = items,
                     .threads = 1 + size / ENTRIES_PER_THREAD,
                     .scratch_bytes = scratch_for(scratch, sizeof(float))};
  return share(&call, &work);
}
