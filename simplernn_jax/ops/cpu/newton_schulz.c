/* Newton-Schulz iterations toward the orthogonal polar factors of matrices.

   Of each matrix M, r x c with r <= c (transposed if not), with X = M / (|M| + 1e-8) and five times

     A = X X^T      B = b A + c A A      X = a X + B X

   where a, b, c are `COEFFICIENTS`. As XLA's operations, of which there are some 15 per matrix,
   `base` takes 1.4 times as long to its first step, and 2 to 4 % longer per step.

   Threads take whole matrices. Operands are packed into panels, and of the symmetric A and B only
   the upper tiles are computed. One thread computes a matrix in one order: results are
   deterministic.

   Arguments and results are the same number of float32 arrays [..., m, n], row-major. */

#include <math.h>
#include <string.h>

#include "call.h"

static const float COEFFICIENTS[3] = {3.4445f, -4.7750f, 2.0315f};
#define ITERATIONS 5
#define ENTRIES_PER_THREAD 2048

#ifdef __AVX512F__
#define ROWS 8
#define LANES 16
#else
#define ROWS 4
#define LANES 8
#endif
#define COLUMNS (2 * LANES) /* a tile of ROWS x COLUMNS sums fits the registers */

typedef float Lanes __attribute__((vector_size(4 * LANES)));

typedef struct {
  const XLA_FFI_Buffer *const *from;
  XLA_FFI_Buffer *const *to;
  int64_t count;
} Matrices;

/* Matrix as an operand: entry (i, k) is at data[i * stride + k * step]. */
typedef struct {
  const float *data;
  int64_t stride, step;
} Operand;

static inline int64_t panels(int64_t n) { return (n + COLUMNS - 1) / COLUMNS; }

/* Copy n x k entries into panels [n / COLUMNS, k, COLUMNS], filled up with zeros. */
static void pack(float *to, Operand from, int64_t n, int64_t k) {
  for (int64_t first = 0; first < n; first += COLUMNS, to += k * COLUMNS) {
    const int64_t inside = least(COLUMNS, n - first);
    if (inside < COLUMNS) memset(to, 0, sizeof(float) * k * COLUMNS);
    const float *data = from.data + first * from.stride;
    if (from.stride == 1)
      for (int64_t j = 0; j < k; j++)
        memcpy(to + j * COLUMNS, data + j * from.step, sizeof(float) * inside);
    else
      for (int64_t i = 0; i < inside; i++)
        for (int64_t j = 0; j < k; j++) to[j * COLUMNS + i] = data[i * from.stride + j * from.step];
  }
}

static void multiply_tile(const float *p, const float *q, int64_t k, float *sums) {
  Lanes tile[ROWS][2] = {0};
  for (int64_t j = 0; j < k; j++, p += COLUMNS, q += COLUMNS) {
    const Lanes left = ((const Lanes *)q)[0], right = ((const Lanes *)q)[1];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      tile[i][0] += p[i] * left;
      tile[i][1] += p[i] * right;
    }
  }
  memcpy(sums, tile, sizeof tile);
}

/* to = by_old old + by_product P Q^T, for panels of P, m x k, and Q, n x k; `old` and `to` are m x n,
   and the same or apart. If P is Q, what is above the diagonal is computed and mirrored. */
static void multiply(float *to, const float *old, float by_old, float by_product, const float *p,
                     const float *q, int64_t m, int64_t n, int64_t k) {
  float sums[ROWS * COLUMNS] __attribute__((aligned(64)));
  for (int64_t column = 0; column < n; column += COLUMNS)
    for (int64_t row = 0; row < m; row += ROWS) {
      if (p == q && row >= column + COLUMNS) break;
      const float *rows = p + row / COLUMNS * COLUMNS * k + row % COLUMNS;
      multiply_tile(rows, q + column * k, k, sums);
      const int64_t width = least(COLUMNS, n - column);
      for (int64_t i = 0; i < least(ROWS, m - row); i++) {
        const int64_t start = (row + i) * n + column;
        for (int64_t j = 0; j < width; j++)
          to[start + j] = by_old * old[start + j] + by_product * sums[i * COLUMNS + j];
      }
    }
  if (p == q)
    for (int64_t i = 1; i < m; i++)
      for (int64_t j = 0; j < i; j++) to[i * n + j] = to[j * n + i];
}

static void iterate(float *x, int64_t r, int64_t c, float *scratch) {
  float *a = scratch, *b = a + r * r, *p = b + r * r;
  p += (-(uintptr_t)p % 64) / sizeof(float);
  float *q = p + panels(r) * COLUMNS * c;
  memset(a, 0, sizeof(float) * r * r);
  for (int i = 0; i < ITERATIONS; i++) {
    pack(p, (Operand){x, c, 1}, r, c);
    multiply(a, a, 0, 1, p, p, r, r, c);
    pack(p, (Operand){a, 1, r}, r, r); /* a symmetric matrix is its transpose */
    multiply(b, a, COEFFICIENTS[1], COEFFICIENTS[2], p, p, r, r, r);
    pack(p, (Operand){b, 1, r}, r, r);
    pack(q, (Operand){x, 1, c}, c, r);
    multiply(x, x, COEFFICIENTS[0], 1, p, q, r, c, r);
  }
}

/* Entries of the scratch memory of an r x c matrix: X, A, B and the panels of two operands. */
static int64_t entries_for(int64_t r, int64_t c) {
  const int64_t p = times(panels(r) * COLUMNS, c), q = times(panels(c) * COLUMNS, r);
  return plus(plus(times(r, c), times(2, times(r, r))), plus(plus(p, q), 32));
}

static int64_t rows_of(const XLA_FFI_Buffer *x) { return x->dims[x->rank - 2]; }
static int64_t columns_of(const XLA_FFI_Buffer *x) { return x->dims[x->rank - 1]; }

static int64_t matrices_in(const XLA_FFI_Buffer *x) {
  const int64_t size = rows_of(x) * columns_of(x);
  return size == 0 ? 0 : entries_of(x) / size;
}

static void run(const void *task, int64_t item, void *scratch) {
  const Matrices *matrices = task;
  int64_t i = 0;
  for (; item >= matrices_in(matrices->from[i]); i++) item -= matrices_in(matrices->from[i]);
  const int64_t m = rows_of(matrices->from[i]), n = columns_of(matrices->from[i]);
  const float *from = (const float *)matrices->from[i]->data + item * m * n;
  float *to = (float *)matrices->to[i]->data + item * m * n, *x = scratch;
  const int64_t r = least(m, n), c = m + n - r;
  double sum = 0;
  for (int64_t j = 0; j < m * n; j++) sum += (double)from[j] * from[j];
  const float scale = 1 / ((float)sqrt(sum) + 1e-8f);
  for (int64_t row = 0; row < m; row++)
    for (int64_t column = 0; column < n; column++)
      x[m > n ? column * c + row : row * c + column] = from[row * n + column] * scale;
  iterate(x, r, c, x + r * c);
  for (int64_t row = 0; row < m; row++)
    for (int64_t column = 0; column < n; column++)
      to[row * n + column] = x[m > n ? column * c + row : row * c + column];
}

XLA_FFI_Error *simplernn_newton_schulz(XLA_FFI_CallFrame *frame) {
  if (is_metadata_query(frame)) return NULL;
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
    if (!is_valid(&call)) break;
    const int64_t r = least(rows_of(x), columns_of(x));
    items = plus(items, matrices_in(x));
    const int64_t needed = entries_for(r, rows_of(x) + columns_of(x) - r);
    if (needed > scratch) scratch = needed;
    size = plus(size, entries_of(x));
  }
  const Matrices matrices = {(const XLA_FFI_Buffer *const *)frame->args.args,
                             (XLA_FFI_Buffer *const *)frame->rets.rets, count};
  const Work work = {.task = &matrices, .run = run, .items = items,
                     .threads = 1 + size / ENTRIES_PER_THREAD,
                     .scratch_bytes = scratch_for(scratch, sizeof(float))};
  return share(&call, &work);
}
