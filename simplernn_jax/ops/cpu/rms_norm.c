/* Root-mean-square normalization, a short causal convolution of its results, and their gradients,
   each in one pass over its arrays.

   With n_t = x_t / sqrt(mean(x_t^2) + EPSILON), and n_t for t < 0 given as `recent`:

     y_t = sum_i w_i n_{t-i}     over those i in 0 .. W - 1 for which no token in t-i+1 .. t is a start
     dn_t = sum_i w_i dy_{t+i}   likewise                 dw_i = sum_t dy_t n_{t-i}
     dx_t = (dn_t - n_t mean(dn_t n_t)) / sqrt(mean(x_t^2) + EPSILON)

   Arrays are float32, row-major: x, y, dx, dy [B, T, D]; recent, final and their gradients
   [B, W - 1, D], the inputs before the first and after the last token; w [W, D]; scale [B, T], the
   factor of each input; starts [B, T] bool, or empty; dw [B, parts, W, D], partial sums over parts
   of consecutive tokens, whose number does not depend on the threads. B may be several axes, the
   same in all arrays; w may have the first of them too. */

#include <string.h>

#include "call.h"
#include "vectors.h"

typedef struct {
  int64_t batch, length, width, dim, parts, part_length, sequences_per_weights;
  const float *x, *w, *recent, *scale_in, *dy, *d_final;
  const uint8_t *starts;
  float *y, *scale, *final, *dx, *dw, *d_recent;
} Arrays;

static void multiply(float *restrict to, const float *restrict x, float by, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = x[i] * by;
}

static void multiply_each(float *restrict to, const float *restrict x, const float *restrict by,
                          int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = x[i] * by[i];
}

static void add_products(float *restrict to, const float *restrict a, const float *restrict b,
                         int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += a[i] * b[i];
}

static void add(float *restrict to, const float *restrict x, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += x[i];
}

static const float *weights_of(const Arrays *a, int64_t b) {
  return a->w + b / a->sequences_per_weights * a->width * a->dim;
}

static int is_start(const Arrays *a, int64_t b, int64_t t) {
  return a->starts != NULL && t >= 0 && a->starts[b * a->length + t];
}

/* dx of one token from dn, n and the scale of x. */
static void norm_gradient(float *restrict dx, const float *restrict dn, const float *restrict n,
                        float scale, int64_t dim) {
  const float projection = dot(dn, n, dim) / dim;
  for (int64_t i = 0; i < dim; i++) dx[i] = (dn[i] - n[i] * projection) * scale;
}

/* n_t; t may be before the first token. */
static void normalize(const Arrays *a, int64_t b, int64_t t, const float *scale, float *to) {
  const int64_t D = a->dim, past = a->width - 1;
  if (t < 0)
    memcpy(to, a->recent + (b * past + past + t) * D, sizeof(float) * D);
  else
    multiply(to, a->x + (b * a->length + t) * D, scale[b * a->length + t], D);
}

static void run_forward(const void *task, int64_t item, void *scratch) {
  const Arrays *a = task;
  const int64_t T = a->length, W = a->width, D = a->dim, past = W - 1;
  const int64_t b = item / a->parts, first = item % a->parts * a->part_length;
  const int64_t end = least(first + a->part_length, T);
  const float *w = weights_of(a, b);
  float *ring = scratch; /* n of the last W tokens */
  for (int64_t t = first - past; t < end; t++) {
    float *own = ring + (t + past) % W * D;
    if (t < 0)
      normalize(a, b, t, NULL, own);
    else {
      const float *x = a->x + (b * T + t) * D, scale = scale_of(x, D);
      multiply(own, x, scale, D);
      if (t >= first) a->scale[b * T + t] = scale;
    }
    if (t < first) continue;
    float *y = a->y + (b * T + t) * D;
    multiply_each(y, own, w, D);
    for (int64_t i = 1; i < W && !is_start(a, b, t - i + 1); i++)
      add_products(y, ring + (t - i + past) % W * D, w + i * D, D);
  }
  if (end == T)
    for (int64_t t = T - past; t < T; t++)
      memcpy(a->final + (b * past + past + t - T) * D, ring + (t + past) % W * D,
             sizeof(float) * D);
}

/* Add to dn of token t, which may be before the first, the gradients of later outputs. */
static void add_from_outputs(const Arrays *a, int64_t b, int64_t t, float *dn) {
  const int64_t T = a->length, W = a->width, D = a->dim, past = W - 1;
  const float *w = weights_of(a, b);
  for (int64_t i = t < 0 ? -t : 0; i < W && t + i < T; i++) {
    if (i > 0 && is_start(a, b, t + i)) break;
    add_products(dn, w + i * D, a->dy + (b * T + t + i) * D, D);
  }
  if (t >= T - past) add(dn, a->d_final + (b * past + past + t - T) * D, D);
}

static void run_backward(const void *task, int64_t item, void *scratch) {
  const Arrays *a = task;
  const int64_t T = a->length, W = a->width, D = a->dim, past = W - 1;
  const int64_t b = item / a->parts, first = item % a->parts * a->part_length;
  const int64_t end = least(first + a->part_length, T);
  float *ring = scratch, *dn = ring + W * D, *dw = a->dw + item * W * D;
  memset(dw, 0, sizeof(float) * W * D);
  for (int64_t t = first - past; t < end; t++) {
    float *own = ring + (t + past) % W * D;
    normalize(a, b, t, a->scale_in, own);
    if (t < first) continue;
    const float *dy = a->dy + (b * T + t) * D;
    add_products(dw, dy, own, D);
    for (int64_t i = 1; i < W && !is_start(a, b, t - i + 1); i++)
      add_products(dw + i * D, dy, ring + (t - i + past) % W * D, D);
    memset(dn, 0, sizeof(float) * D);
    add_from_outputs(a, b, t, dn);
    norm_gradient(a->dx + (b * T + t) * D, dn, own, a->scale_in[b * T + t], D);
  }
  if (first > 0) return;
  for (int64_t t = -past; t < 0; t++) {
    float *to = a->d_recent + (b * past + past + t) * D;
    memset(to, 0, sizeof(float) * D);
    add_from_outputs(a, b, t, to);
  }
}

/* Tokens per item of work, which fit the second-level cache. */
#define TOKENS_PER_PART 128

#define INPUTS(a) SHAPE(a.length, a.dim)
#define RECENT(a) SHAPE(a.width - 1, a.dim)

/* Number of sequences that share weights, which have the first batch axes, or none. */
static int64_t sequences_per_weights(const Call *call, int64_t num_leading) {
  int64_t count = 1;
  for (int64_t i = num_leading; i < call->num_leading; i++) count *= call->leading[i];
  return count;
}

/* Arguments x, w, recent, starts, in this order. */
static Arrays read_arguments(Call *call) {
  Arrays a = {
      .batch = call->batch,
      .length = axis_of(call, 0, 0, 2),
      .dim = axis_of(call, 0, 0, 1),
      .width = axis_of(call, 0, 1, 2),
      .part_length = TOKENS_PER_PART,
  };
  const XLA_FFI_Buffer *w = buffer_at(call, 0, 1, "weights");
  int64_t num_leading = w == NULL ? 0 : least(w->rank - 2, call->num_leading);
  if (num_leading < 0) num_leading = 0;
  reject_empty(call, least(a.length, least(a.dim, a.width)));
  a.parts = divided(a.length, TOKENS_PER_PART);
  a.x = argument(call, 0, "x", INPUTS(a));
  a.w = checked(call, w, "weights", XLA_FFI_DataType_F32, num_leading, SHAPE(a.width, a.dim));
  a.sequences_per_weights = sequences_per_weights(call, num_leading);
  a.recent = argument(call, 2, "recent", RECENT(a));
  a.starts = flags(call, 3, "starts", a.length);
  return a;
}

/* Entries of x: about ten microseconds of work. */
#define ENTRIES_PER_THREAD (1 << 16)

static XLA_FFI_Error *share_convolution(Call *call, const Arrays *a,
                                 void (*run)(const void *, int64_t, void *), int64_t vectors) {
  const int64_t entries = a->batch * a->length * a->dim;
  const Work work = {.task = a,
                     .run = run,
                     .items = a->batch * a->parts,
                     .threads = entries / ENTRIES_PER_THREAD,
                     .scratch_bytes = scratch_for(vectors * a->dim, sizeof(float))};
  return share(call, &work);
}

/* (x, w, recent, starts) -> (y, scale, final) */
XLA_FFI_Error *simplernn_convolution_forward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  Call call = begin(frame, "simplernn_convolution_forward", "x", 2, 4, 3);
  Arrays a = read_arguments(&call);
  a.y = result(&call, 0, "y", INPUTS(a));
  a.scale = result(&call, 1, "scale", SHAPE(a.length));
  a.final = result(&call, 2, "final", RECENT(a));
  return share_convolution(&call, &a, run_forward, a.width);
}

/* (x, w, recent, starts, scale, dy, d_final) -> (dx, dw, d_recent) */
XLA_FFI_Error *simplernn_convolution_backward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  Call call = begin(frame, "simplernn_convolution_backward", "x", 2, 7, 3);
  Arrays a = read_arguments(&call);
  a.parts = axis_of(&call, 1, 1, 3);
  a.scale_in = argument(&call, 4, "scale", SHAPE(a.length));
  a.dy = argument(&call, 5, "dy", INPUTS(a));
  a.d_final = argument(&call, 6, "d_final", RECENT(a));
  a.dx = result(&call, 0, "dx", INPUTS(a));
  a.dw = result(&call, 1, "dw", SHAPE(a.parts, a.width, a.dim));
  a.d_recent = result(&call, 2, "d_recent", RECENT(a));
  reject_empty(&call, a.parts);
  if (is_valid(&call)) a.part_length = divided(a.length, a.parts);
  return share_convolution(&call, &a, run_backward, a.width + 1);
}

/* The norm alone, or its product with silu(gate) = gate sigmoid(gate): independent tokens. */
typedef struct {
  int64_t tokens, dim;
  const float *x, *gate, *scale_in, *dy;
  float *y, *scale, *dx, *d_gate;
} Norm;

static void multiply_by_silu(float *restrict y, const float *restrict gate, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] *= gate[i] / (1 + exponential(-gate[i]));
}

/* dn and the gradient of the gate, from dy and n. */
static void gate_gradients(float *restrict dn, float *restrict d_gate, const float *restrict dy,
                           const float *restrict n, const float *restrict gate, int64_t dim) {
  for (int64_t i = 0; i < dim; i++) {
    const float sigmoid = 1 / (1 + exponential(-gate[i])), silu = gate[i] * sigmoid;
    dn[i] = dy[i] * silu;
    d_gate[i] = dy[i] * n[i] * (sigmoid + silu * (1 - sigmoid));
  }
}

#define TOKENS_PER_ITEM 256

static void run_norm_forward(const void *task, int64_t item, void *scratch) {
  (void)scratch;
  const Norm *n = task;
  const int64_t D = n->dim, end = least((item + 1) * TOKENS_PER_ITEM, n->tokens);
  for (int64_t i = item * TOKENS_PER_ITEM; i < end; i++) {
    n->scale[i] = scale_of(n->x + i * D, D);
    multiply(n->y + i * D, n->x + i * D, n->scale[i], D);
    if (n->gate != NULL) multiply_by_silu(n->y + i * D, n->gate + i * D, D);
  }
}

static void run_norm_backward(const void *task, int64_t item, void *scratch) {
  const Norm *n = task;
  const int64_t D = n->dim, end = least((item + 1) * TOKENS_PER_ITEM, n->tokens);
  for (int64_t i = item * TOKENS_PER_ITEM; i < end; i++) {
    const float *dn = n->dy + i * D;
    multiply(scratch, n->x + i * D, n->scale_in[i], D);
    if (n->gate != NULL) {
      float *gated = (float *)scratch + D;
      gate_gradients(gated, n->d_gate + i * D, dn, scratch, n->gate + i * D, D);
      dn = gated;
    }
    norm_gradient(n->dx + i * D, dn, scratch, n->scale_in[i], D);
  }
}

static Norm read_norm(Call *call) {
  Norm n = {.tokens = call->batch, .dim = axis_of(call, 0, 0, 1)};
  reject_empty(call, n.dim);
  n.x = argument(call, 0, "x", SHAPE(n.dim));
  return n;
}

static XLA_FFI_Error *share_norm(Call *call, const Norm *n,
                                 void (*run)(const void *, int64_t, void *)) {
  const Work work = {.task = n,
                     .run = run,
                     .items = divided(n->tokens, TOKENS_PER_ITEM),
                     .threads = n->tokens * n->dim / ENTRIES_PER_THREAD,
                     .scratch_bytes = scratch_for(2 * n->dim, sizeof(float))};
  return share(call, &work);
}

#define NO_AXES ((Shape){0, NULL})

/* x[, gate] -> (y, scale) */
XLA_FFI_Error *simplernn_norm_forward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int is_gated = frame->args.size == 2;
  Call call = begin(frame, "simplernn_norm_forward", "x", 1, 1 + is_gated, 2);
  Norm n = read_norm(&call);
  if (is_gated) n.gate = argument(&call, 1, "gate", SHAPE(n.dim));
  n.y = result(&call, 0, "y", SHAPE(n.dim));
  n.scale = result(&call, 1, "scale", NO_AXES);
  return share_norm(&call, &n, run_norm_forward);
}

/* (x, scale, dy[, gate]) -> dx[, d_gate] */
XLA_FFI_Error *simplernn_norm_backward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int is_gated = frame->args.size == 4;
  Call call = begin(frame, "simplernn_norm_backward", "x", 1, 3 + is_gated, 1 + is_gated);
  Norm n = read_norm(&call);
  if (is_gated) {
    n.gate = argument(&call, 3, "gate", SHAPE(n.dim));
    n.d_gate = result(&call, 1, "d_gate", SHAPE(n.dim));
  }
  n.scale_in = argument(&call, 1, "scale", NO_AXES);
  n.dy = argument(&call, 2, "dy", SHAPE(n.dim));
  n.dx = result(&call, 0, "dx", SHAPE(n.dim));
  return share_norm(&call, &n, run_norm_backward);
}
