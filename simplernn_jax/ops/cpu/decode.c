/* Tokens of a language model of SimpleRNN in parallel or residual blocks, for any number of sequences.

   Per layer, with the norm n(x) = x / sqrt(mean(x^2) + EPSILON), C the short convolution, and S the
   state of a head:

     q, k, v, g, r = in_proj(C(n(x)))               (r: pre-activation of the output gate)
     S = diag(sigmoid(g)) S + sigmoid(k) v^T        y = n(S^T q) * r sigmoid(r)
     x' = x + out_proj(y)                           x = x' + mlp_out(max(mlp_in(m), 0)^2)

   where m is C(n(x)) in parallel blocks, n(x') in the others;
   before them x = embedding * sqrt(D), after them logits = head(n(x) * final_scale).

   Each output is summed in the order of its inputs: a sequence's results are the same bits whatever
   the number of sequences, their order and the threads, and however its tokens are divided among
   calls. Sequences without tokens keep state and logits.

   Each token reads the state in one slot and leaves the next one in another, or in the same. Logits
   are computed after a sequence's last token, and after those whose slot the next one leaves alone. */

#include <math.h>

#include "panels.h"
#include "vectors.h"

typedef struct {
  int64_t active, length, rows; /* sequences with tokens, most tokens of one, and tokens in all */
  int64_t layers, dim, heads, key_dim, value_dim, mlp_dim, vocab, width;
  int format, is_parallel;
  Matrix embedding, in_proj, out_proj, mlp_in, mlp_out, head;
  const float *convolution, *bias, *final_scale, *head_bias;
  const int32_t *tokens, *num_tokens, *slots; /* slots: before each token and after the last one */
  float *final, *logits, **states; /* of each layer: S [slots, H, K, V], recent [slots, 3, D] */
  int32_t *sequences; /* those with tokens */
  int32_t *starts, *first_outputs; /* row of the first token of each, and its first logits */
  int32_t *outputs; /* slots of the logits, in the order of their inputs */
  int64_t num_outputs;
  int64_t groups; /* 0: threads share the items of each phase */
  float *x, *normed, *projected, *heads_output, *hidden;
} Decoder;

enum { ASSIGN, ADD, SQUARED_RELU };

#define BLOCK 96 /* rows of an item */
#define APART 16 /* the fewest rows that one thread takes through all layers */
#define IN_CACHE (1 << 21) /* the most weights that threads may read apart for fewer than BLOCK rows */

/* A panel of outputs of a block of rows: x ``[rows, in]`` to y ``[rows, stride]``, whose rows are at
   `outputs`, unless it is NULL. */
static void project(const Decoder *d, const Matrix *m, int64_t item, const float *x, float *y,
                    int64_t stride, const int32_t *outputs, const float *bias, int how) {
  float sums[ROWS * PANEL];
  const int64_t panel = item % m->panels, start = item / m->panels * BLOCK;
  const int64_t count = least(BLOCK, (outputs == NULL ? d->rows : d->num_outputs) - start);
  const int64_t first = panel * PANEL, columns = least(PANEL, m->outputs - first);
  const int64_t tiles = divided(count, ROWS);
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t begin = start + count * t / tiles, rows = start + count * (t + 1) / tiles - begin;
    const float *from = x + begin * m->inputs;
    if (d->format == FLOAT32) multiply_float32(m, panel, rows, from, sums);
    if (d->format == BFLOAT16) multiply_bfloat16(m, panel, rows, from, sums);
    if (d->format == INT8) multiply_int8(m, panel, rows, from, sums);
    if (d->format == INT4) multiply_int4(m, panel, rows, from, sums);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = outputs == NULL ? begin + r : outputs[begin + r];
      float *to = y + row * stride + first;
      const float *sum = sums + r * PANEL;
      for (int64_t c = 0; c < columns; c++) {
        const float value = bias == NULL ? sum[c] : sum[c] + bias[first + c];
        const float positive = value > 0 || value != value ? value : 0;
        to[c] = how == ADD ? to[c] + value : how == ASSIGN ? value : positive * positive;
      }
    }
  }
}

static void sigmoid(float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = 1 / (1 + exponential(-x[i]));
}

static void normalize(float *restrict to, const float *restrict x, const float *restrict scale,
                      int64_t n) {
  const float by = scale_of(x, n);
  for (int64_t i = 0; i < n; i++) to[i] = scale == NULL ? x[i] * by : x[i] * by * scale[i];
}

/* x = embedding of a token times sqrt(D); NaN outside of the vocabulary. */
static void embed(const Decoder *d, int64_t row, int64_t token) {
  const Matrix *m = &d->embedding;
  const int is_id = token >= 0 && token < d->vocab;
  const int64_t panel = is_id ? token / PANEL : 0, column = is_id ? token % PANEL : 0;
  const char *values = m->values + panel * panel_bytes(d->format, m->inputs);
  const float scale = is_id ? sqrtf(d->dim) : NAN;
  for (int64_t i = 0; i < d->dim; i++) {
    const float by = m->scales[(panel * m->groups + i / m->group) * PANEL + column];
    d->x[row * d->dim + i] = value_at(values, d->format, i, column) * by * scale;
  }
}

/* C of a token's scaled input: w holds its weights, from the newest of its inputs to the oldest. */
static void convolve_token(float *restrict to, const float *restrict x, float by,
                           const float *restrict w, float *restrict last, float *restrict second,
                           float *restrict third, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const float own = x[i] * by;
    to[i] = w[i] * own + w[n + i] * last[i] + w[2 * n + i] * second[i] + w[3 * n + i] * third[i];
    third[i] = second[i];
    second[i] = last[i];
    last[i] = own;
  }
}

/* The slots of sequence n: token t reads the t-th of them, and leaves the next one. */
static const int32_t *slots_of(const Decoder *d, int64_t n) { return d->slots + n * (d->length + 1); }

/* Whether the logits after token t are computed. */
static int has_logits(const Decoder *d, int64_t n, int64_t t) {
  const int32_t *slots = slots_of(d, n);
  return t + 1 == d->num_tokens[n] || slots[t + 1] != slots[t + 2];
}

/* normed = C(n(x)) of the s-th sequence, and the next inputs of the convolution. */
static void convolve(const Decoder *d, int64_t layer, int64_t s) {
  const int64_t D = d->dim, n = d->sequences[s];
  const float *w = d->convolution + layer * 4 * D;
  const int32_t *slots = slots_of(d, n);
  for (int64_t t = 0; t < d->num_tokens[n]; t++) {
    const int64_t row = d->starts[s] - d->starts[0] + t;
    if (layer == 0) embed(d, row, d->tokens[n * d->length + t]);
    const float *x = d->x + row * D, *from = d->states[2 * layer + 1] + slots[t] * D * 3;
    float *recent = d->states[2 * layer + 1] + slots[t + 1] * D * 3;
    if (recent != from) memcpy(recent, from, sizeof(float) * 3 * D);
    convolve_token(d->normed + row * D, x, scale_of(x, D), w, recent + 2 * D, recent + D, recent, D);
  }
}

/* The state S after a token, and S^T q, of the w * LANES columns of values from S, v and y. */
INLINE void recur_columns(const float *from, float *S, const float *q, const float *k,
                          const float *g, const float *v, float *y, int64_t key_dim,
                          int64_t value_dim, const int w) {
  Lanes sum[4];
  for (int j = 0; j < w; j++) sum[j] = (Lanes){0};
  for (int64_t i = 0; i < key_dim; i++)
    for (int j = 0; j < w; j++) {
      FloatsAt *at = (FloatsAt *)(S + i * value_dim + j * LANES);
      const Lanes old = *(const FloatsAt *)(from + i * value_dim + j * LANES);
      *at = old * g[i] + *(const FloatsAt *)(v + j * LANES) * k[i];
      sum[j] += *at * q[i];
    }
  for (int j = 0; j < w; j++) *(FloatsAt *)(y + j * LANES) = sum[j];
}

/* A head's output for a token, and its state S after it; `from` before it may be S too. */
static void recur(const Decoder *d, const float *from, float *S, int64_t row, int64_t head) {
  const int64_t H = d->heads, K = d->key_dim, V = d->value_dim;
  float *q = d->projected + row * d->width + head * K, *k = q + H * K;
  float *v = d->projected + row * d->width + 2 * H * K + head * V;
  float *g = k + H * K + H * V, *r = v + H * V + H * K;
  float *y = d->heads_output + (row * H + head) * V;
  sigmoid(k, K);
  sigmoid(g, K);
  int64_t c = 0;
  for (; c + 4 * LANES <= V; c += 4 * LANES)
    recur_columns(from + c, S + c, q, k, g, v + c, y + c, K, V, 4);
  for (; c + LANES <= V; c += LANES)
    recur_columns(from + c, S + c, q, k, g, v + c, y + c, K, V, 1);
  for (; c < V; c++) {
    y[c] = 0;
    for (int64_t i = 0; i < K; i++) {
      S[i * V + c] = from[i * V + c] * g[i] + v[c] * k[i];
      y[c] += S[i * V + c] * q[i];
    }
  }
  const float by = scale_of(y, V);
  for (int64_t i = 0; i < V; i++) y[i] = y[i] * by * r[i] / (1 + exponential(-r[i]));
}

enum { CONVOLVE, PROJECT, RECUR, MIX, NORM, MLP_IN, MLP_OUT, PHASES, FINAL_NORM = PHASES, HEAD };

/* x normalized, for a block of rows. */
static void normalize_rows(const Decoder *d, int64_t item) {
  const int64_t D = d->dim;
  for (int64_t row = item * BLOCK; row < least((item + 1) * BLOCK, d->rows); row++)
    normalize(d->normed + row * D, d->x + row * D, NULL, D);
}

/* Inputs of the head of the s-th sequence; those whose logits are computed are also in normed. */
static void normalize_final(const Decoder *d, int64_t s) {
  const int64_t D = d->dim, n = d->sequences[s], count = d->num_tokens[n];
  const float *x = d->x + (d->starts[s] - d->starts[0]) * D;
  float *to = d->final + n * d->length * D;
  float *input = d->normed + (d->first_outputs[s] - d->first_outputs[0]) * D;
  for (int64_t t = 0; t < count; t++, to += D) {
    normalize(to, x + t * D, d->final_scale, D);
    if (!has_logits(d, n, t)) continue;
    memcpy(input, to, sizeof(float) * D);
    input += D;
  }
}

/* Number of items of a phase. */
static int64_t items_of(const Decoder *d, int phase) {
  const int64_t blocks = divided(d->rows, BLOCK);
  switch (phase) {
    case CONVOLVE: return d->active;
    case FINAL_NORM: return d->active;
    case PROJECT: return d->in_proj.panels * blocks;
    case RECUR: return d->active * d->heads;
    case MIX: return d->out_proj.panels * blocks;
    case NORM: return d->is_parallel ? 0 : blocks;
    case MLP_IN: return d->mlp_in.panels * blocks;
    case MLP_OUT: return d->mlp_out.panels * blocks;
    case HEAD: return d->head.panels * divided(d->num_outputs, BLOCK);
    default: return blocks;
  }
}

static int64_t items_per_layer(const Decoder *d) {
  int64_t sum = 0;
  for (int phase = 0; phase < PHASES; phase++) sum += items_of(d, phase);
  return sum;
}

/* Number of items of all phases. */
static int64_t num_items(const Decoder *d) {
  return d->layers * items_per_layer(d) + items_of(d, FINAL_NORM) + items_of(d, HEAD);
}

/* The phase of an item, whose index in this phase replaces it. */
static int phase_of(const Decoder *d, int64_t *item, int64_t *layer) {
  const int64_t per_layer = items_per_layer(d);
  *layer = least(*item / per_layer, d->layers);
  *item -= *layer * per_layer;
  int phase = *layer == d->layers ? FINAL_NORM : CONVOLVE;
  while (phase < HEAD && *item >= items_of(d, phase)) *item -= items_of(d, phase++);
  return phase;
}

static int64_t phase_start(const void *task, int64_t item) {
  int64_t index = item, layer;
  phase_of(task, &index, &layer);
  return item - index;
}

static Matrix of_layer(Matrix m, int format, int64_t layer) {
  m.values += layer * m.panels * panel_bytes(format, m.inputs);
  m.scales += layer * m.panels * m.groups * PANEL;
  return m;
}

static void run_item(const void *task, int64_t i, void *scratch) {
  (void)scratch;
  const Decoder *d = task;
  int64_t layer;
  const int phase = phase_of(d, &i, &layer);
  const int64_t D = d->dim, width = d->width;
  const Matrix *matrices[] = {[PROJECT] = &d->in_proj, [MIX] = &d->out_proj, [MLP_IN] = &d->mlp_in,
                              [MLP_OUT] = &d->mlp_out, [HEAD] = &d->head};
  Matrix m = {0};
  if (matrices[phase]) m = of_layer(*matrices[phase], d->format, phase == HEAD ? 0 : layer);
  switch (phase) {
    case CONVOLVE: return convolve(d, layer, i);
    case PROJECT:
      return project(d, &m, i, d->normed, d->projected, width, NULL, d->bias + layer * width, ASSIGN);
    case RECUR: {
      const int64_t s = i / d->heads, head = i % d->heads, n = d->sequences[s];
      const int64_t of_head = d->key_dim * d->value_dim, size = d->heads * of_head;
      const int32_t *slots = slots_of(d, n);
      float *all = d->states[2 * layer] + head * of_head;
      for (int64_t t = 0; t < d->num_tokens[n]; t++)
        recur(d, all + slots[t] * size, all + slots[t + 1] * size, d->starts[s] - d->starts[0] + t,
              head);
      return;
    }
    case MIX: return project(d, &m, i, d->heads_output, d->x, D, NULL, NULL, ADD);
    case NORM: return normalize_rows(d, i);
    case MLP_IN:
      return project(d, &m, i, d->normed, d->hidden, d->mlp_dim, NULL, NULL, SQUARED_RELU);
    case MLP_OUT: return project(d, &m, i, d->hidden, d->x, D, NULL, NULL, ADD);
    case FINAL_NORM: return normalize_final(d, i);
    default:
      return project(d, &m, i, d->normed, d->logits, d->vocab, d->outputs, d->head_bias, ASSIGN);
  }
}

/* All tokens of a group of sequences: a thread that is interrupted makes no other wait. */
static void run_group(const void *task, int64_t g, void *scratch) {
  Decoder d = *(const Decoder *)task;
  const int64_t first = d.active * g / d.groups, end = d.active * (g + 1) / d.groups;
  const int64_t before = d.starts[first], outputs_before = d.first_outputs[first];
  d.rows = (end < d.active ? d.starts[end] : d.rows) - before;
  d.num_outputs = (end < d.active ? d.first_outputs[end] : d.num_outputs) - outputs_before;
  d.active = end - first;
  d.outputs += outputs_before;
  d.first_outputs += first;
  d.sequences += first;
  d.starts += first;
  d.x += before * d.dim;
  d.normed += before * d.dim;
  d.projected += before * d.width;
  d.heads_output += before * d.heads * d.value_dim;
  d.hidden += before * d.mlp_dim;
  const int64_t items = num_items(&d);
  for (int64_t i = 0; i < items; i++) run_item(&d, i, scratch);
}

#define STATES 21 /* arguments before the states */
#define WEIGHTS_PER_THREAD (1 << 20) /* multiplied by one row: about 20 microseconds */

/* (tokens [N, T], num_tokens, logits, embedding, in_proj, out_proj, mlp_in, mlp_out, head,
   convolution, bias, final_scale, head_bias, parallel, slots [N, T + 1], states ...) -> (logits, inputs of the
   head [N, T, D], workspace, states ...), where each matrix is two arguments, values and scales. Logits
   and states have an axis of slots in front. */
XLA_FFI_Error *simplernn_decode(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  const int64_t layers = frame->args.size < STATES ? 0 : (frame->args.size - STATES) / 2;
  Call call = begin(frame, "simplernn_decode", "tokens", 1, STATES + 2 * layers, 3 + 2 * layers);
  float *states[2 * layers + 1];
  const XLA_FFI_Buffer *values = buffer_at(&call, 0, 3, "embedding");
  Decoder d = {.layers = layers,
               .states = states,
               .format = values == NULL ? FLOAT32 : values->dtype,
               .length = axis_of(&call, 0, 0, 1),
               .dim = axis_of(&call, 0, 17, 1),
               .vocab = axis_of(&call, 0, 18, 1),
               .heads = layers == 0 ? 0 : axis_of(&call, 0, STATES, 3),
               .key_dim = layers == 0 ? 0 : axis_of(&call, 0, STATES, 2),
               .value_dim = layers == 0 ? 0 : axis_of(&call, 0, STATES, 1)};
  const int64_t D = d.dim, L = layers;
  const int64_t keys = d.heads * d.key_dim, outputs = d.heads * d.value_dim;
  d.width = divided(3 * keys + 2 * outputs, PANEL) * PANEL;
  const int64_t num_slots = axis_of(&call, 0, 2, 2);
  const int64_t M = d.mlp_dim = axis_of(&call, 0, 9, 3) * PANEL; /* filled with zeros */
  const int64_t smallest = least(least(D, d.vocab), least(M, least(keys, outputs)));
  if (call.num_leading != 1) reject(&call, "%s: tokens: expected [N, T]", call.function);
  reject_empty(&call, least(d.length, smallest));
  if (d.format != FLOAT32 && d.format != BFLOAT16 && d.format != INT8 && d.format != INT4)
    reject(&call, "%s: embedding: expected float32, bfloat16, int32 or uint32", call.function);
  d.tokens = checked(&call, buffer_at(&call, 0, 0, "tokens"), "tokens", XLA_FFI_DataType_S32, 1,
                     SHAPE(d.length));
  d.num_tokens = checked(&call, buffer_at(&call, 0, 1, "num_tokens"), "num_tokens",
                         XLA_FFI_DataType_S32, 1, (Shape){0, NULL});
  d.embedding = matrix_argument(&call, 3, "embedding", d.format, 0, D, d.vocab);
  d.in_proj = matrix_argument(&call, 5, "in_proj", d.format, L, D, d.width);
  d.out_proj = matrix_argument(&call, 7, "out_proj", d.format, L, outputs, D);
  d.mlp_in = matrix_argument(&call, 9, "mlp_in", d.format, L, D, M);
  d.mlp_out = matrix_argument(&call, 11, "mlp_out", d.format, L, M, D);
  d.head = matrix_argument(&call, 13, "head", d.format, 0, D, d.vocab);
  d.convolution = shared_argument(&call, 15, "convolution", SHAPE(L, 4, D));
  d.bias = shared_argument(&call, 16, "bias", SHAPE(L, d.width));
  d.final_scale = shared_argument(&call, 17, "final_scale", SHAPE(D));
  d.head_bias = shared_argument(&call, 18, "head_bias", SHAPE(d.vocab));
  const float *parallel = shared_argument(&call, 19, "parallel", SHAPE(1));
  d.is_parallel = is_valid(&call) && *parallel != 0;
  d.slots = checked(&call, buffer_at(&call, 0, 20, "slots"), "slots", XLA_FFI_DataType_S32, 1,
                    SHAPE(d.length + 1));
  const int64_t per_row = 2 * D + d.width + outputs + M + 4;
  d.final = result(&call, 1, "final", SHAPE(d.length, D));
  float *work = result(&call, 2, "workspace", SHAPE(d.length * per_row));
  d.logits = updated(&call, 2, 0, "logits", SHAPE(num_slots, d.vocab));
  for (int64_t i = 0; i < 2 * L; i += 2) {
    states[i] = updated(&call, STATES + i, 3 + i, "state",
                        SHAPE(num_slots, d.heads, d.key_dim, d.value_dim));
    states[i + 1] = updated(&call, STATES + i + 1, 4 + i, "recent", SHAPE(num_slots, 3, D));
  }
  if (is_valid(&call)) {
    const int64_t rows = call.batch * d.length;
    d.x = work;
    d.normed = d.x + rows * D;
    d.projected = d.normed + rows * D;
    d.heads_output = d.projected + rows * d.width;
    d.hidden = d.heads_output + rows * outputs;
    d.sequences = (int32_t *)(d.hidden + rows * M);
    d.starts = d.sequences + rows;
    d.first_outputs = d.starts + rows;
    d.outputs = d.first_outputs + rows;
    for (int64_t n = 0; n < call.batch; n++) {
      const int64_t count = d.num_tokens[n];
      if (count < 0 || count > d.length)
        reject(&call, "%s: num_tokens: %lld is not in 0 to %lld", call.function, (long long)count,
               (long long)d.length);
      for (int64_t t = 0; t <= d.length; t++)
        if (slots_of(&d, n)[t] < 0 || slots_of(&d, n)[t] >= num_slots)
          reject(&call, "%s: slots: one is not in 0 to %lld", call.function, (long long)num_slots - 1);
      if (!is_valid(&call)) break;
      memset(d.final + (n * d.length + count) * D, 0, sizeof(float) * (d.length - count) * D);
      if (count == 0) continue;
      d.starts[d.active] = d.rows;
      d.first_outputs[d.active] = d.num_outputs;
      d.sequences[d.active++] = n;
      for (int64_t t = 0; t < count; t++)
        if (has_logits(&d, n, t)) d.outputs[d.num_outputs++] = slots_of(&d, n)[t + 1];
      d.rows += count;
    }
  }
  const int64_t of_layer_weights = D * (d.width + outputs + 2 * M);
  const int64_t weights = D * d.vocab + L * of_layer_weights;
  /* Long sequences one by one, or short ones of one length in a group for each thread. */
  const int64_t pool = pool_size(frame), all = d.active * d.length;
  const int are_long = d.rows >= APART * d.active && d.rows >= all / 4 && d.active >= 2 * pool;
  const int are_alike = d.rows == all && 8 * divided(d.active, pool) * pool <= 9 * d.active;
  const int64_t of_thread = weights > IN_CACHE ? BLOCK : APART;
  if (are_long)
    d.groups = d.active;
  else if (are_alike && pool > 1 && d.rows >= of_thread * pool)
    d.groups = pool;
  const Work shared = {.task = &d,
                       .run = d.groups > 0 ? run_group : run_item,
                       .start = d.groups > 0 ? NULL : phase_start,
                       .items = d.groups > 0 ? d.groups : d.rows > 0 ? num_items(&d) : 0,
                       .threads = d.rows * weights / WEIGHTS_PER_THREAD};
  return share(&call, &shared);
}
