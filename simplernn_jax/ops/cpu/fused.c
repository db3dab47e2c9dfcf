/* The recurrence and its gradient, token by token, with the state in the first-level cache.

   Per head, with g = e^log_gate and S a K x V matrix:

     S_t = diag(g_t) S_{t-1} + k_t v_t^T            y_t = S_t^T q_t
     D_t = diag(g_{t+1}) D_{t+1} + q_t dy_t^T       (D: gradient of S)
     dq_t = S_t dy_t    dk_t = D_t v_t    dv_t = D_t^T k_t    dlog_gate_t = g_t rowsum(D_t * S_{t-1})

   Every result is a sum over one axis of S or D, and independent along the other: a tile of one or
   two vectors of LANES entries of that axis goes through all tokens. y and dv use tiles of columns,
   dq, dk and dlog_gate tiles of rows. The order of additions is that of time for any number of
   threads: results are deterministic.

   Arrays are float32, row-major: q, k, gate, dq, dk, dl [B, T, H, K]; v, y, dy, dv [B, T, H, V];
   states [B, H, K, V]; reset [B, T] bool, or empty: where true, the state is reset before t.
   B may be several axes, the same in all arrays.

   With three more arguments, biases [H, K] of keys and gates and a scalar, q, k and gate are what
   SimpleRNN's projections return: queries are q times the scalar, keys and gates are sigmoids of k and
   gate plus bias. These are two more results; the gradient takes them, and the scalar as one more
   argument. XLA would take eight operations for it. */

#include <math.h>

#include "call.h"
#include "vectors.h"

typedef struct {
  int64_t batch, length, heads, key_dim, value_dim;
  const float *q, *k, *v, *gate, *initial, *d_output, *d_final;
  const float *key_bias, *gate_bias; /* NULL: k and gate are keys and gates */
  int has_sigmoids;                   /* the gradients are of what keys and gates are sigmoids of */
  float query_scale, *keys, *gates;
  const uint8_t *reset;
  float *output, *final, *d_q, *d_k, *d_v, *d_log_gate, *d_initial;
} Arrays;

/* Number of lanes of vector j of a tile inside an axis with `left` entries. */
INLINE int64_t inside(int64_t left, int j) {
  int64_t n = left - j * LANES;
  return n < 0 ? 0 : least(n, LANES);
}

INLINE Lanes load(const float *from, int64_t n) {
  if (n == LANES) return *(const FloatsAt *)from;
  Lanes x = {0};
  memcpy(&x, from, 4 * n);
  return x;
}

INLINE void store(float *to, Lanes x, int64_t n) {
  if (n == LANES)
    *(FloatsAt *)to = x;
  else
    memcpy(to, &x, 4 * n);
}

INLINE Lanes load_column(const float *from, int64_t stride, int64_t n) {
  Lanes x = {0};
  for (int64_t i = 0; i < n; i++) x[i] = from[i * stride];
  return x;
}

INLINE int is_reset(const Arrays *a, int64_t b, int64_t t) {
  return a->reset != NULL && a->reset[b * a->length + t];
}

/* Prefetch what is read AHEAD tokens later: hardware prefetchers miss the stride over heads.
   Prefetching outside of an array is safe. */
#define AHEAD 16
INLINE void prefetch(const float *from, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(from + i);
}

/* Queries, keys and gates of a token. */
typedef struct {
  const float *q, *k, *gate;
} Token;

INLINE void sigmoids(float *restrict to, const float *restrict x, const float *restrict bias, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = 1 / (1 + exponential(-(x[i] + bias[i])));
}

/* If they are results, they are computed here: for all tiles, each in its `memory`, and stored by one. */
INLINE Token token_of(const Arrays *a, int64_t token, int64_t head, int is_stored, float *memory) {
  const int64_t K = a->key_dim;
  const float *q = a->q + token * K, *k = a->k + token * K, *gate = a->gate + token * K;
  if (a->query_scale != 1) {
    for (int64_t i = 0; i < K; i++) memory[i] = a->query_scale * q[i];
    q = memory;
  }
  if (a->key_bias == NULL) return (Token){q, k, gate};
  float *keys = is_stored ? a->keys + token * K : memory + K;
  float *gates = is_stored ? a->gates + token * K : memory + 2 * K;
  sigmoids(keys, k, a->key_bias + head * K, K);
  sigmoids(gates, gate, a->gate_bias + head * K, K);
  return (Token){q, keys, gates};
}

/* y and the final state of the columns from `first`; `state` holds K * w vectors. */
INLINE void output_columns(const Arrays *a, int64_t b, int64_t head, int64_t first, const int w,
                           Lanes *state) {
  const int64_t K = a->key_dim, V = a->value_dim, left = V - first;
  const int64_t by_state = (b * a->heads + head) * K * V + first, ahead = AHEAD * a->heads * K;
  for (int64_t i = 0; i < K; i++)
    for (int j = 0; j < w; j++)
      state[i * w + j] = load(a->initial + by_state + i * V + j * LANES, inside(left, j));
  for (int64_t t = 0; t < a->length; t++) {
    const int64_t token = (b * a->length + t) * a->heads + head;
    prefetch(a->q + token * K + ahead, K);
    prefetch(a->k + token * K + ahead, K);
    prefetch(a->gate + token * K + ahead, K);
    const Token x = token_of(a, token, head, first == 0, (float *)(state + K * w));
    const float *q = x.q, *k = x.k, *gate = x.gate;
    prefetch(a->v + (token + AHEAD * a->heads) * V + first, w * LANES);
    if (is_reset(a, b, t)) memset(state, 0, sizeof(Lanes) * K * w);
    Lanes v[2], even[2], odd[2];
    for (int j = 0; j < w; j++) {
      v[j] = load(a->v + token * V + first + j * LANES, inside(left, j));
      even[j] = odd[j] = (Lanes){0};
    }
    int64_t i = 0;
    for (; i + 1 < K; i += 2)
      for (int j = 0; j < w; j++) {
        Lanes one = state[i * w + j] * gate[i] + v[j] * k[i];
        Lanes two = state[(i + 1) * w + j] * gate[i + 1] + v[j] * k[i + 1];
        state[i * w + j] = one;
        state[(i + 1) * w + j] = two;
        even[j] += one * q[i];
        odd[j] += two * q[i + 1];
      }
    for (; i < K; i++)
      for (int j = 0; j < w; j++) {
        Lanes one = state[i * w + j] * gate[i] + v[j] * k[i];
        state[i * w + j] = one;
        even[j] += one * q[i];
      }
    for (int j = 0; j < w; j++)
      store(a->output + token * V + first + j * LANES, even[j] + odd[j], inside(left, j));
  }
  for (int64_t i = 0; i < K; i++)
    for (int j = 0; j < w; j++)
      store(a->final + by_state + i * V + j * LANES, state[i * w + j], inside(left, j));
}

/* dv and the gradient of the initial state of the columns from `first`. */
INLINE void gradient_columns(const Arrays *a, int64_t b, int64_t head, int64_t first,
                             const int w, Lanes *d_state) {
  const int64_t K = a->key_dim, V = a->value_dim, left = V - first;
  const int64_t by_state = (b * a->heads + head) * K * V + first, ahead = AHEAD * a->heads * K;
  for (int64_t i = 0; i < K; i++)
    for (int j = 0; j < w; j++)
      d_state[i * w + j] = load(a->d_final + by_state + i * V + j * LANES, inside(left, j));
  for (int64_t t = a->length - 1; t >= 0; t--) {
    const int64_t token = (b * a->length + t) * a->heads + head;
    prefetch(a->q + token * K - ahead, K);
    prefetch(a->k + token * K - ahead, K);
    prefetch(a->gate + token * K - ahead, K);
    const Token x = token_of(a, token, head, 0, (float *)(d_state + K * w));
    const float *q = x.q, *k = x.k, *gate = x.gate;
    prefetch(a->d_output + (token - AHEAD * a->heads) * V + first, w * LANES);
    Lanes dy[2], even[2], odd[2];
    for (int j = 0; j < w; j++) {
      dy[j] = load(a->d_output + token * V + first + j * LANES, inside(left, j));
      even[j] = odd[j] = (Lanes){0};
    }
    int64_t i = 0;
    for (; i + 1 < K; i += 2)
      for (int j = 0; j < w; j++) {
        Lanes one = d_state[i * w + j] + dy[j] * q[i];
        Lanes two = d_state[(i + 1) * w + j] + dy[j] * q[i + 1];
        d_state[i * w + j] = one * gate[i];
        d_state[(i + 1) * w + j] = two * gate[i + 1];
        even[j] += one * k[i];
        odd[j] += two * k[i + 1];
      }
    for (; i < K; i++)
      for (int j = 0; j < w; j++) {
        Lanes one = d_state[i * w + j] + dy[j] * q[i];
        d_state[i * w + j] = one * gate[i];
        even[j] += one * k[i];
      }
    if (is_reset(a, b, t)) memset(d_state, 0, sizeof(Lanes) * K * w);
    for (int j = 0; j < w; j++)
      store(a->d_v + token * V + first + j * LANES, even[j] + odd[j], inside(left, j));
  }
  for (int64_t i = 0; i < K; i++)
    for (int j = 0; j < w; j++)
      store(a->d_initial + by_state + i * V + j * LANES, d_state[i * w + j], inside(left, j));
}

/* Advance S of the rows from `first`, transposed, from token `start` to `end`: `state` holds V * w
   vectors. Writes dq if `with_d_q`, and to `entering`, unless NULL, the state before each token. */
INLINE void advance_rows(const Arrays *a, int64_t b, int64_t head, int64_t first, const int w,
                         int64_t start, int64_t end, Lanes *state, Lanes *entering,
                         const int with_d_q) {
  const int64_t K = a->key_dim, V = a->value_dim, left = K - first;
  for (int64_t t = start; t < end; t++) {
    const int64_t token = (b * a->length + t) * a->heads + head;
    const float *v = a->v + token * V, *dy = a->d_output + token * V;
    const int64_t next = token + AHEAD * a->heads;
    prefetch(a->v + next * V, V);
    if (with_d_q) prefetch(a->d_output + next * V, V);
    prefetch(a->k + next * K + first, w * LANES);
    prefetch(a->gate + next * K + first, w * LANES);
    if (is_reset(a, b, t)) memset(state, 0, sizeof(Lanes) * V * w);
    Lanes *kept = entering == NULL ? NULL : entering + (t - start) * V * w;
    Lanes k[2], gate[2], even[2], odd[2];
    for (int j = 0; j < w; j++) {
      k[j] = load(a->k + token * K + first + j * LANES, inside(left, j));
      gate[j] = load(a->gate + token * K + first + j * LANES, inside(left, j));
      even[j] = odd[j] = (Lanes){0};
    }
    int64_t i = 0;
    for (; i + 1 < V; i += 2)
      for (int j = 0; j < w; j++) {
        Lanes one = state[i * w + j], two = state[(i + 1) * w + j];
        if (kept != NULL) {
          kept[i * w + j] = one;
          kept[(i + 1) * w + j] = two;
        }
        one = one * gate[j] + k[j] * v[i];
        two = two * gate[j] + k[j] * v[i + 1];
        state[i * w + j] = one;
        state[(i + 1) * w + j] = two;
        if (with_d_q) {
          even[j] += one * dy[i];
          odd[j] += two * dy[i + 1];
        }
      }
    for (; i < V; i++)
      for (int j = 0; j < w; j++) {
        Lanes one = state[i * w + j];
        if (kept != NULL) kept[i * w + j] = one;
        one = one * gate[j] + k[j] * v[i];
        state[i * w + j] = one;
        if (with_d_q) even[j] += one * dy[i];
      }
    if (with_d_q)
      for (int j = 0; j < w; j++)
        store(a->d_q + token * K + first + j * LANES, a->query_scale * (even[j] + odd[j]), inside(left, j));
  }
}

/* dk and dlog_gate of the rows from `first`, from token `end` - 1 back to `start`. */
INLINE void reverse_rows(const Arrays *a, int64_t b, int64_t head, int64_t first, const int w,
                         int64_t start, int64_t end, Lanes *d_state, const Lanes *entering) {
  const int64_t K = a->key_dim, V = a->value_dim, left = K - first;
  for (int64_t t = end - 1; t >= start; t--) {
    const int64_t token = (b * a->length + t) * a->heads + head;
    const float *v = a->v + token * V, *dy = a->d_output + token * V;
    const int64_t next = token - AHEAD * a->heads;
    prefetch(a->v + next * V, V);
    prefetch(a->d_output + next * V, V);
    prefetch(a->q + next * K + first, w * LANES);
    prefetch(a->gate + next * K + first, w * LANES);
    const Lanes *before = entering + (t - start) * V * w;
    Lanes q[2], gate[2], d_k[2], d_gate[2];
    for (int j = 0; j < w; j++) {
      q[j] = a->query_scale * load(a->q + token * K + first + j * LANES, inside(left, j));
      gate[j] = load(a->gate + token * K + first + j * LANES, inside(left, j));
      d_k[j] = d_gate[j] = (Lanes){0};
    }
    for (int64_t i = 0; i < V; i++)
      for (int j = 0; j < w; j++) {
        const Lanes one = d_state[i * w + j] + q[j] * dy[i];
        d_k[j] += one * v[i];
        d_gate[j] += one * before[i * w + j];
        d_state[i * w + j] = one * gate[j];
      }
    if (is_reset(a, b, t)) memset(d_state, 0, sizeof(Lanes) * V * w);
    for (int j = 0; j < w; j++) {
      d_gate[j] *= gate[j];
      if (a->has_sigmoids) {
        const Lanes k = load(a->k + token * K + first + j * LANES, inside(left, j));
        d_k[j] *= k * (1 - k);
        d_gate[j] *= 1 - gate[j];
      }
      store(a->d_k + token * K + first + j * LANES, d_k[j], inside(left, j));
      store(a->d_log_gate + token * K + first + j * LANES, d_gate[j], inside(left, j));
    }
  }
}

/* Tokens per block, whose states `gradient_rows` keeps together: as many as fit the second-level
   cache, or, for long sequences, sqrt(T), so that the states at the blocks' starts stay few. */
#define KEPT_BYTES (192 * 1024)

static int64_t block_length(const Arrays *a, int w) {
  if (a->value_dim == 0) return 1; /* rejected */
  int64_t fits = KEPT_BYTES / (sizeof(Lanes) * w * a->value_dim);
  int64_t root = (int64_t)sqrt((double)a->length);
  return fits > root ? fits : root + 1;
}

/* Blocks before the last one. */
static int64_t full_blocks(const Arrays *a, int64_t block) { return (a->length - 1) / block; }

INLINE void gradient_rows(const Arrays *a, int64_t b, int64_t head, int64_t first, const int w,
                          Lanes *scratch) {
  const int64_t K = a->key_dim, V = a->value_dim, left = K - first, size = V * w;
  const int64_t by_state = ((b * a->heads + head) * K + first) * V;
  const int64_t block = block_length(a, w), last = full_blocks(a, block);
  Lanes *state = scratch, *d_state = state + size, *entering = d_state + size;
  Lanes *starts = entering + size * least(block, a->length);
  for (int64_t i = 0; i < V; i++)
    for (int j = 0; j < w; j++) {
      const int64_t from = by_state + j * LANES * V + i;
      state[i * w + j] = load_column(a->initial + from, V, inside(left, j));
      d_state[i * w + j] = load_column(a->d_final + from, V, inside(left, j));
    }
  for (int64_t s = 0; s < last; s++) {
    memcpy(starts + s * size, state, sizeof(Lanes) * size);
    advance_rows(a, b, head, first, w, s * block, (s + 1) * block, state, NULL, 1);
  }
  advance_rows(a, b, head, first, w, last * block, a->length, state, entering, 1);
  for (int64_t s = last; s >= 0; s--) {
    const int64_t end = least((s + 1) * block, a->length);
    if (s < last) advance_rows(a, b, head, first, w, s * block, end, starts + s * size, entering, 0);
    reverse_rows(a, b, head, first, w, s * block, end, d_state, entering);
  }
}

typedef struct {
  Arrays arrays;
  int row_vectors, column_vectors;
  int64_t row_items, row_tiles, column_tiles;
} Task;

#define KEYS(a) SHAPE(a.length, a.heads, a.key_dim)
#define VALUES(a) SHAPE(a.length, a.heads, a.value_dim)
#define STATE(a) SHAPE(a.heads, a.key_dim, a.value_dim)

/* Entries of the state times tokens: about ten microseconds of work. */
#define ENTRIES_PER_THREAD (1 << 18)

static int64_t threads_for(const Arrays *a) {
  const int64_t tokens = a->batch * a->length * a->heads;
  return tokens * a->key_dim * a->value_dim / ENTRIES_PER_THREAD;
}

static float scalar(Call *call, int64_t i) {
  const float *x = shared_argument(call, i, "query scale", (Shape){0, NULL});
  return x == NULL ? 1 : *x;
}

/* Arguments q, k, v, gate, initial state, reset, in this order. */
static Arrays read_arguments(Call *call) {
  Arrays a = {
      .query_scale = 1,
      .batch = call->batch,
      .length = axis_of(call, 0, 0, 3),
      .heads = axis_of(call, 0, 0, 2),
      .key_dim = axis_of(call, 0, 0, 1),
      .value_dim = axis_of(call, 0, 2, 1),
  };
  reject_empty(call, least(least(a.length, a.heads), least(a.key_dim, a.value_dim)));
  a.q = argument(call, 0, "q", KEYS(a));
  a.k = argument(call, 1, "k", KEYS(a));
  a.v = argument(call, 2, "v", VALUES(a));
  a.gate = argument(call, 3, "gate", KEYS(a));
  a.initial = argument(call, 4, "initial state", STATE(a));
  a.reset = flags(call, 5, "reset", a.length);
  return a;
}

/* Vectors per tile: two share the reads of their common operands. */
static int vectors_for(int64_t width) {
  return divided(width, LANES) % 2 == 0 ? 2 : 1;
}

static int64_t tiles_for(int64_t width, int w) { return divided(width, w * LANES); }

/* Bytes for a tile of columns: K * w vectors of the state, and a token. */
static int64_t column_bytes(const Arrays *a, int w) {
  return scratch_for(a->key_dim, sizeof(Lanes) * w + 3 * sizeof(float));
}

static void run_forward(const void *data, int64_t item, void *scratch) {
  const Task *task = data;
  const Arrays *a = &task->arrays;
  const int64_t tile = item % task->column_tiles, pair = item / task->column_tiles;
  const int64_t b = pair / a->heads, head = pair % a->heads, first = tile * task->column_vectors * LANES;
  if (task->column_vectors == 2)
    output_columns(a, b, head, first, 2, scratch);
  else
    output_columns(a, b, head, first, 1, scratch);
}

static void run_backward(const void *data, int64_t item, void *scratch) {
  const Task *task = data;
  const Arrays *a = &task->arrays;
  const int of_rows = item < task->row_items;
  const int64_t index = of_rows ? item : item - task->row_items;
  const int64_t tiles = of_rows ? task->row_tiles : task->column_tiles;
  const int64_t pair = index / tiles, b = pair / a->heads, head = pair % a->heads;
  if (of_rows && task->row_vectors == 2)
    gradient_rows(a, b, head, index % tiles * 2 * LANES, 2, scratch);
  else if (of_rows)
    gradient_rows(a, b, head, index % tiles * LANES, 1, scratch);
  else if (task->column_vectors == 2)
    gradient_columns(a, b, head, index % tiles * 2 * LANES, 2, scratch);
  else
    gradient_columns(a, b, head, index % tiles * LANES, 1, scratch);
}

/* (q, k, v, gate, initial state, reset[, key bias, gate bias, query scale])
   -> (output, final state[, keys, gates]) */
XLA_FFI_Error *simplernn_forward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int has_biases = frame->args.size == 9;
  Call call = begin(frame, "simplernn_forward", "q", 3, has_biases ? 9 : 6, has_biases ? 4 : 2);
  Task task = {.arrays = read_arguments(&call)};
  Arrays *a = &task.arrays;
  a->output = result(&call, 0, "output", VALUES((*a)));
  a->final = result(&call, 1, "final state", STATE((*a)));
  if (has_biases) {
    a->key_bias = shared_argument(&call, 6, "key bias", SHAPE(a->heads, a->key_dim));
    a->gate_bias = shared_argument(&call, 7, "gate bias", SHAPE(a->heads, a->key_dim));
    a->query_scale = scalar(&call, 8);
    a->keys = result(&call, 2, "keys", KEYS((*a)));
    a->gates = result(&call, 3, "gates", KEYS((*a)));
  }
  task.column_vectors = vectors_for(a->value_dim);
  task.column_tiles = tiles_for(a->value_dim, task.column_vectors);
  const Work work = {.task = &task,
                     .run = run_forward,
                     .items = a->batch * a->heads * task.column_tiles,
                     .threads = threads_for(a),
                     .scratch_bytes = column_bytes(a, task.column_vectors)};
  return share(&call, &work);
}

/* (q, keys, v, gates, initial state, reset, d_output, d_final_state[, query scale])
   -> (d_q, d_k, d_v, d_log_gate, d_initial_state) */
XLA_FFI_Error *simplernn_backward(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int has_sigmoids = frame->args.size == 9;
  Call call = begin(frame, "simplernn_backward", "q", 3, has_sigmoids ? 9 : 8, 5);
  Task task = {.arrays = read_arguments(&call)};
  Arrays *a = &task.arrays;
  a->has_sigmoids = has_sigmoids;
  if (has_sigmoids) a->query_scale = scalar(&call, 8);
  a->d_output = argument(&call, 6, "d_output", VALUES((*a)));
  a->d_final = argument(&call, 7, "d_final_state", STATE((*a)));
  a->d_q = result(&call, 0, "d_q", KEYS((*a)));
  a->d_k = result(&call, 1, "d_k", KEYS((*a)));
  a->d_v = result(&call, 2, "d_v", VALUES((*a)));
  a->d_log_gate = result(&call, 3, "d_log_gate", KEYS((*a)));
  a->d_initial = result(&call, 4, "d_initial_state", STATE((*a)));
  const int64_t pairs = a->batch * a->heads;
  /* Not two of 16, whose states before each token would fill twice as much of the cache. */
  task.row_vectors = LANES < 16 ? vectors_for(a->key_dim) : 1;
  task.column_vectors = vectors_for(a->value_dim);
  task.row_tiles = tiles_for(a->key_dim, task.row_vectors);
  task.column_tiles = tiles_for(a->value_dim, task.column_vectors);
  task.row_items = pairs * task.row_tiles;
  const int64_t block = block_length(a, task.row_vectors);
  const int64_t states = 2 + least(block, a->length) + full_blocks(a, block);
  const int64_t rows = scratch_for(a->value_dim * states, sizeof(Lanes) * task.row_vectors);
  const int64_t columns = column_bytes(a, task.column_vectors);
  const Work work = {.task = &task,
                     .run = run_backward,
                     .items = task.row_items + pairs * task.column_tiles,
                     .threads = threads_for(a),
                     .scratch_bytes = rows > columns ? rows : columns};
  return share(&call, &work);
}
