/* Newton-Schulz iterations toward the orthogonal polar factors of matrices.

   Of each matrix M, r x c with r <= c (transposed if not), with X = M / (|M| + 1e-8) and five times

     A = X X^T      B = b A + c A A      X = a X + B X

   where a, b, c are `COEFFICIENTS`. As XLA's operations, of which there are some 15 per matrix,
   `base` takes 1.4 times as long to its first step, and 2 to 4 % longer per step.

   Where the processor multiplies bfloat16 fast (`matmul.h`), operands are rounded to it, as in the
   reference implementation of Muon; sums and X are float32. Threads take whole matrices, and one thread
   computes a matrix in one order: results are deterministic.

   Arguments and results are the same number of float32 arrays [..., m, n], row-major. */

#define _GNU_SOURCE /* for syscall */
#include <math.h>
#include <string.h>

#include "call.h"
#include "matmul.h"

static const float COEFFICIENTS[3] = {3.4445f, -4.7750f, 2.0315f};
#define ITERATIONS 5
#define ENTRIES_PER_THREAD 2048
#define SQUARES 4

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
      multiply_panel(rows, panel, groups, sums, tiles);
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
  const int64_t groups = groups_of(r);
  to_panels_of_transpose(s->right, groups * COLUMNS, rows_of(s->left, q, r, r), groups, r, r);
  multiply(to, old, by_old, by_product, rows_of(s->left, p, r, r), s->right, r, r, r, 1, tiles);
}

static void iterate(float *x, int64_t r, int64_t c, const Scratch *s) {
  float *a = s->squares[0], *b = s->squares[1];
  const int tiles = has_tiles();
  if (tiles) set_up_tiles();
  for (int i = 0; i < ITERATIONS; i++) {
    const Group *rows = rows_of(s->left, x, r, c);
    gram(a, rows, r, c, s, tiles);
    to_panels_of_transpose(s->x_panels, groups_of(r) * COLUMNS, rows, groups_of(c), r, c);
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
  to_panels_of_transpose(s->x_panels, groups_of(r) * COLUMNS, rows, groups_of(c), r, c);
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
