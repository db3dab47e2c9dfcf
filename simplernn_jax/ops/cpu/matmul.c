/* A dense layer of n kernels and its gradient, with operands in bfloat16 and sums in float32:

     y_i = x W_i      dx = sum_i dy_i W_i^T      dW_i = x^T dy_i

   or, with squared ReLU, z_i = max(x W_i, 0)^2 with gradient dy_i = 2 sqrt(z_i) dz_i.

   XLA's CPU backend takes two to four times as long: it multiplies only row-major matrices, so that
   other operations round, concatenate and transpose operands, and split results. Here all operands
   are rounded and packed once; then threads share blocks of the results. Each entry is summed by one
   thread in one order: results are deterministic.

   x is [tokens, in], bfloat16 or, forward, float32; dx likewise; W_i is [in, out_i]; z_i and dz_i are
   bfloat16; all else is float32. tokens and in are multiples of ALIGNED; out_i are filled up to one
   with zeros. */

#define _GNU_SOURCE /* for syscall */
#include "call.h"
#include "matmul.h"

#define ALIGNED 32 /* = COLUMNS = TILE_ROWS = GROUP * GROUPS with bfloat16 */

#ifdef HAS_BFLOAT16
#define MOST_KERNELS 16
#define BLOCK_ROWS (4 * TILE_ROWS)
#define BLOCK_PANELS 16
#define BLOCK_GROUPS 512
#define OPERATIONS_PER_THREAD (1 << 20)

/* to [m, n] = sum over j of rows_j [m, groups_j] times panels_j [n / COLUMNS, groups_j, COLUMNS]; or the
   same rounded to bfloat16, after squared ReLU or not. */
typedef struct {
  int64_t m, n, terms;
  float *to;
  uint16_t *rounded;
  int squared_relu;
  struct {
    const Group *rows, *panels;
    int64_t groups;
  } term[MOST_KERNELS];
} Product;

typedef struct {
  int64_t tokens, in, kernels, out[MOST_KERNELS];
  const float *x, *kernel[MOST_KERNELS], *d_y[MOST_KERNELS];
  const uint16_t *low_x, *z[MOST_KERNELS], *d_z[MOST_KERNELS];
  Group *rounded_x, *x_rows, *kernel_panels[MOST_KERNELS], *d_y_rows[MOST_KERNELS], *d_y_panels[MOST_KERNELS];
  int64_t widest, packs, products, blocks;
  Product product[MOST_KERNELS + 1];
} Dense;

static int64_t blocks_of(const Product *p) {
  return divided(p->m, BLOCK_ROWS) * divided(p->n, BLOCK_PANELS * COLUMNS);
}

/* Add one term to a tile of TILE_ROWS rows at `to`, of which `width` columns exist. */
static void multiply(float *to, int64_t n, int64_t width, const Group *rows, int64_t stride, const Group *panel,
                     int64_t groups, int is_first, int tiles) {
  float sums[TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
#ifdef HAS_AMX
  if (tiles && width == COLUMNS) {
    multiply_tile(rows, stride, panel, groups, to, n, is_first);
    return;
  }
#endif
  if (is_first)
    memset(sums, 0, sizeof sums);
  else
    for (int64_t i = 0; i < TILE_ROWS; i++) memcpy(sums + i * COLUMNS, to + i * n, sizeof(float) * width);
#ifdef HAS_AMX
  if (tiles)
    multiply_tile(rows, stride, panel, groups, sums, COLUMNS, 0);
  else
#endif
    for (int64_t i = 0; i < TILE_ROWS; i += ROWS)
      multiply_rows(rows + i * stride, stride, panel, groups, sums + i * COLUMNS);
  for (int64_t i = 0; i < TILE_ROWS; i++) memcpy(to + i * n, sums + i * COLUMNS, sizeof(float) * width);
}

INLINE __m512 widened(const uint16_t *from, __mmask16 inside) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, from)), 16);
}

/* A tile of a result in bfloat16: its sums do not leave the first-level cache. */
static void multiply_rounded(const Product *p, int64_t row, int64_t column, int tiles) {
  float sums[TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
  for (int64_t t = 0; t < p->terms; t++) {
    const int64_t groups = p->term[t].groups;
    multiply(sums, COLUMNS, COLUMNS, p->term[t].rows + row * groups, groups, p->term[t].panels + column * groups, groups,
             t == 0, tiles);
  }
  for (int64_t j = 0; j < least(COLUMNS, p->n - column); j += LANES) {
    const __mmask16 inside = lanes(p->n - column - j);
    for (int64_t i = 0; i < TILE_ROWS; i++) {
      __m512 x = _mm512_load_ps(sums + i * COLUMNS + j);
      if (p->squared_relu) x = _mm512_mul_ps(x, _mm512_max_ps(x, _mm512_setzero_ps()));
      store_rounded(p->rounded + (row + i) * p->n + column + j, x, inside);
    }
  }
}

static void multiply_block(const Product *p, int64_t block) {
  const int64_t row_blocks = divided(p->m, BLOCK_ROWS);
  const int64_t columns = blocks_of(p) / row_blocks;
  const int64_t row = block / columns * BLOCK_ROWS, column = block % columns * BLOCK_PANELS * COLUMNS;
  const int64_t end = least(p->m, row + BLOCK_ROWS), last = least(p->n, column + BLOCK_PANELS * COLUMNS);
  const int tiles = has_tiles();
  if (tiles) set_up_tiles();
  if (p->rounded != NULL)
    for (int64_t i = row; i < end; i += TILE_ROWS)
      for (int64_t j = column; j < last; j += COLUMNS) multiply_rounded(p, i, j, tiles);
  for (int64_t t = 0; t < p->terms && p->rounded == NULL; t++) {
    const int64_t groups = p->term[t].groups;
    for (int64_t start = 0; start < groups; start += BLOCK_GROUPS)
      for (int64_t i = row; i < end; i += TILE_ROWS) /* whole rows, which processors prefetch */
        for (int64_t j = column; j < last; j += COLUMNS)
          multiply(p->to + i * p->n + j, p->n, least(COLUMNS, p->n - j), p->term[t].rows + i * groups + start, groups,
                   p->term[t].panels + j * groups + start * COLUMNS, least(BLOCK_GROUPS, groups - start),
                   t == 0 && start == 0, tiles);
  }
  if (tiles) _tile_release();
}

/* Pack ALIGNED tokens, or as many rows of the kernels: they become groups of the contracted axis. */
static void pack_forward(const Dense *d, int64_t item, Group *scratch) {
  const int64_t groups = d->in / GROUP, token_items = d->x == NULL ? 0 : d->tokens / ALIGNED;
  if (item < token_items) {
    const int64_t row = item * ALIGNED;
    round_rows(d->rounded_x + row * groups, groups, d->x + row * d->in, ALIGNED, d->in);
    return;
  }
  const int64_t row = (item - token_items) * ALIGNED;
  for (int64_t k = 0; k < d->kernels; k++) {
    const int64_t stride = groups_of(d->out[k]);
    round_rows(scratch, stride, d->kernel[k] + row * d->out[k], ALIGNED, d->out[k]);
    to_panels_of_transpose(d->kernel_panels[k] + row / GROUP * COLUMNS, groups * COLUMNS, scratch, stride, ALIGNED,
                           d->out[k]);
  }
}

/* Rows of groups of dy = 2 sqrt(z) dz, of ALIGNED tokens. */
static void round_gradient(Group *to, int64_t stride, const uint16_t *z, const uint16_t *d_z, int64_t n) {
  for (int64_t i = 0; i < ALIGNED; i++, to += stride)
    for (int64_t j = 0; j < stride * GROUP; j += LANES) {
      const __mmask16 inside = j < n ? lanes(n - j) : 0;
      const __m512 root = _mm512_sqrt_ps(widened(z + i * n + j, inside));
      const __m512 d_y = _mm512_mul_ps(_mm512_add_ps(root, root), widened(d_z + i * n + j, inside));
      store_rounded((uint16_t *)to + j, d_y, -1);
    }
}

static void pack_backward(const Dense *d, int64_t item, Group *scratch) {
  const int64_t token_items = d->tokens / ALIGNED, token_groups = d->tokens / GROUP;
  if (item >= token_items) { /* COLUMNS rows of the kernels */
    const int64_t row = (item - token_items) * ALIGNED;
    for (int64_t k = 0; k < d->kernels; k++) {
      const int64_t groups = groups_of(d->out[k]);
      round_rows(scratch, groups, d->kernel[k] + row * d->out[k], ALIGNED, d->out[k]);
      to_panels(d->kernel_panels[k] + row * groups, scratch, ALIGNED, groups);
    }
    return;
  }
  const int64_t token = item * ALIGNED, first = token / GROUP;
  for (int64_t k = 0; k < d->kernels; k++) {
    const int64_t groups = groups_of(d->out[k]);
    Group *rows = d->d_y_rows[k] + token * groups;
    const int64_t start = token * d->out[k];
    if (d->z[k] != NULL)
      round_gradient(rows, groups, d->z[k] + start, d->d_z[k] + start, d->out[k]);
    else
      round_rows(rows, groups, d->d_y[k] + start, ALIGNED, d->out[k]);
    to_panels_of_transpose(d->d_y_panels[k] + first * COLUMNS, token_groups * COLUMNS, rows, groups, ALIGNED, d->out[k]);
  }
  const Group *x = (const Group *)(d->low_x + token * d->in);
  to_panels_of_transpose(scratch, GROUPS * COLUMNS, x, d->in / GROUP, ALIGNED, d->in);
  for (int64_t i = 0; i < d->in; i += COLUMNS)
    transpose((float *)(d->x_rows + i * token_groups + first), token_groups, (const float *)(scratch + i * GROUPS),
              COLUMNS, GROUPS, COLUMNS);
}

static void run_pack(const void *task, int64_t item, void *scratch) {
  const Dense *d = task;
  if (d->x_rows == NULL)
    pack_forward(d, item, scratch);
  else
    pack_backward(d, item, scratch);
}

/* Item i of n takes the i-th n-th of the blocks of each product: threads keep their tokens. */
static void run_blocks(const void *task, int64_t item, void *scratch) {
  (void)scratch;
  const Dense *d = task;
  for (const Product *p = d->product; p < d->product + d->products; p++) {
    const int64_t blocks = blocks_of(p);
    for (int64_t b = blocks * item / d->blocks; b < blocks * (item + 1) / d->blocks; b++) multiply_block(p, b);
  }
}

static int is_bfloat16(Call *call, int is_result, int64_t i) {
  const XLA_FFI_Buffer *buffer = buffer_at(call, is_result, i, "an array");
  return buffer != NULL && buffer->dtype == XLA_FFI_DataType_BF16;
}

static void *low_matrix(Call *call, int is_result, int64_t i, const char *name, int64_t m, int64_t n) {
  return checked(call, buffer_at(call, is_result, i, name), name, XLA_FFI_DataType_BF16, 0, SHAPE(m, n));
}

/* Kernels and sizes of a call with `per_kernel` arguments for each, after x. */
static Dense read_kernels(Call *call, int64_t per_kernel) {
  Dense d = {.tokens = axis_of(call, 0, 0, 2), .in = axis_of(call, 0, 0, 1)};
  d.kernels = (call->frame->args.size - 1) / per_kernel;
  call->num_leading = 0;
  if (d.kernels > MOST_KERNELS || d.tokens % ALIGNED || d.in % ALIGNED) reject(call, "%s: wrong sizes", call->function);
  reject_empty(call, least(d.tokens, d.in));
  for (int64_t k = 0; is_valid(call) && k < d.kernels; k++) {
    d.out[k] = axis_of(call, 0, 1 + k, 1);
    d.kernel[k] = shared_argument(call, 1 + k, "kernel", SHAPE(d.in, d.out[k]));
    reject_empty(call, d.out[k]);
    if (groups_of(d.out[k]) > d.widest) d.widest = groups_of(d.out[k]);
  }
  return d;
}

/* Memory of packed operands: a result that nobody reads. */
static Group *packed(Call *call, int64_t i, int64_t groups) {
  const XLA_FFI_Buffer *buffer = buffer_at(call, 1, i, "packed");
  return checked(call, buffer, "packed", XLA_FFI_DataType_U32, 0, SHAPE(groups));
}

/* A result that is float32 or bfloat16. */
static void set_result(Call *call, int64_t i, Product *p) {
  if (is_bfloat16(call, 1, i))
    p->rounded = low_matrix(call, 1, i, "a result", p->m, p->n);
  else
    p->to = result(call, i, "a result", SHAPE(p->m, p->n));
}

static XLA_FFI_Error *compute(Call *call, Dense *d) {
  int64_t operations = 0;
  for (int64_t i = 0; is_valid(call) && i < d->products; i++) {
    const Product *p = &d->product[i];
    if (blocks_of(p) > d->blocks) d->blocks = blocks_of(p);
    for (int64_t t = 0; t < p->terms; t++) operations += p->m * p->n * p->term[t].groups;
  }
  const int64_t widest = d->widest > d->in ? d->widest : d->in;
  const Work pack = {.task = d, .run = run_pack, .items = d->packs, .threads = 1 + operations / OPERATIONS_PER_THREAD,
                     .scratch_bytes = scratch_for(widest * ALIGNED, sizeof(Group))};
  XLA_FFI_Error *error = share(call, &pack);
  if (error != NULL) return error;
  const Work multiply = {.task = d, .run = run_blocks, .items = d->blocks, .threads = pack.threads};
  return share(call, &multiply);
}

/* x, W_i to y_i, then x in bfloat16 if it is float32, then packed operands. */
XLA_FFI_Error *simplernn_dense_forward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int64_t kernels = frame->args.size - 1;
  Call call = begin(frame, "simplernn_dense_forward", "x", 2, 1 + kernels, frame->rets.size);
  const int is_low = is_bfloat16(&call, 0, 0), squared_relu = is_bfloat16(&call, 1, 0);
  if (frame->rets.size != kernels + 2 - is_low) reject(&call, "simplernn_dense_forward: wrong number of results");
  Dense d = read_kernels(&call, 1);
  if (is_low) {
    d.rounded_x = low_matrix(&call, 0, 0, "x", d.tokens, d.in);
  } else {
    d.x = shared_argument(&call, 0, "x", SHAPE(d.tokens, d.in));
    d.rounded_x = low_matrix(&call, 1, kernels, "rounded x", d.tokens, d.in);
  }
  int64_t size = 0;
  for (int64_t k = 0; is_valid(&call) && k < kernels; k++) size += rounded_up(d.out[k], ALIGNED) * d.in / GROUP;
  Group *memory = packed(&call, kernels + 1 - is_low, size);
  for (int64_t k = 0; is_valid(&call) && k < kernels; k++) {
    d.kernel_panels[k] = memory;
    memory += rounded_up(d.out[k], ALIGNED) * d.in / GROUP;
    Product *p = &d.product[d.products++];
    *p = (Product){.m = d.tokens, .n = d.out[k], .terms = 1, .squared_relu = squared_relu,
                   .term = {{d.rounded_x, d.kernel_panels[k], d.in / GROUP}}};
    set_result(&call, k, p);
  }
  d.packs = (is_low ? 0 : d.tokens / ALIGNED) + d.in / ALIGNED;
  return compute(&call, &d);
}

/* x, W_i, dy_i or, with squared ReLU, dz_i and z_i to dx, dW_i, packed operands. */
XLA_FFI_Error *simplernn_dense_backward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  Call call = begin(frame, "simplernn_dense_backward", "x", 2, frame->args.size, frame->rets.size);
  const int squared_relu = is_bfloat16(&call, 0, frame->args.size - 1);
  const int64_t kernels = frame->rets.size - 2, per_kernel = 2 + squared_relu;
  if (frame->args.size != 1 + per_kernel * kernels)
    reject(&call, "simplernn_dense_backward: wrong number of arguments or results");
  Dense d = read_kernels(&call, per_kernel);
  d.low_x = low_matrix(&call, 0, 0, "x", d.tokens, d.in);
  int64_t size = d.in * d.tokens / GROUP;
  for (int64_t k = 0; is_valid(&call) && k < kernels; k++)
    size += (d.in + 2 * d.tokens) * rounded_up(d.out[k], ALIGNED) / GROUP;
  Group *memory = packed(&call, kernels + 1, size);
  d.x_rows = memory;
  if (is_valid(&call)) memory += d.in * d.tokens / GROUP;
  Product *d_x = &d.product[0];
  *d_x = (Product){.m = d.tokens, .n = d.in, .terms = kernels};
  set_result(&call, 0, d_x);
  d.products = 1;
  for (int64_t k = 0; is_valid(&call) && k < kernels; k++) {
    const int64_t groups = groups_of(d.out[k]);
    if (squared_relu) {
      d.d_z[k] = low_matrix(&call, 0, 1 + kernels + k, "dz", d.tokens, d.out[k]);
      d.z[k] = low_matrix(&call, 0, 1 + 2 * kernels + k, "z", d.tokens, d.out[k]);
    } else {
      d.d_y[k] = shared_argument(&call, 1 + kernels + k, "dy", SHAPE(d.tokens, d.out[k]));
    }
    d.kernel_panels[k] = memory;
    d.d_y_rows[k] = memory + d.in * groups;
    d.d_y_panels[k] = d.d_y_rows[k] + d.tokens * groups;
    memory = d.d_y_panels[k] + d.tokens * groups;
    d_x->term[k].rows = d.d_y_rows[k];
    d_x->term[k].panels = d.kernel_panels[k];
    d_x->term[k].groups = groups;
    Product *p = &d.product[d.products++];
    *p = (Product){.m = d.in, .n = d.out[k], .terms = 1, .term = {{d.x_rows, d.d_y_panels[k], d.tokens / GROUP}}};
    p->to = result(&call, 1 + k, "dW", SHAPE(d.in, d.out[k]));
  }
  d.packs = (d.tokens + d.in) / ALIGNED;
  return compute(&call, &d);
}
#endif
