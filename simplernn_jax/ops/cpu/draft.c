/* Draft tokens of speculative decoding: what followed the last tokens when they came before.

   The history of a sequence is a ring of its last tokens, and a table has the position after the
   newest occurrence of each n-gram, by its hash. Positions are numbers of tokens modulo 2^32, and
   both sizes powers of 2: no content of these arrays leads outside of them. */

#include "call.h"

#define LONGEST 32 /* tokens of a match that are counted */

enum { LENGTH, MATCH, MATCHED, ORDER, CURSOR }; /* MATCH: position after the match, 0: none */

typedef struct {
  int32_t *ring;
  uint32_t *table, *cursor; /* cursor [CURSOR] */
  uint32_t ring_mask, table_mask;
} History;

/* Hash of the last tokens, of which `next` is the newest. */
static uint32_t hash_of(const History *h, int32_t next) {
  uint32_t hash = next;
  for (uint32_t i = 1; i < h->cursor[ORDER]; i++)
    hash = (hash ^ hash >> 15) * 0x9e3779b1u + h->ring[(h->cursor[LENGTH] - i) & h->ring_mask];
  hash *= 0x85ebca6bu;
  return (hash ^ hash >> 15) & h->table_mask;
}

/* The newest match of the last tokens and `next`, a longer one if they continue it. */
static void match_next(const History *h, int32_t next, uint32_t hash, uint32_t *at, uint32_t *count) {
  const uint32_t length = h->cursor[LENGTH], match = h->cursor[MATCH], matched = h->cursor[MATCHED];
  *at = *count = 0; /* which may be those of the cursor */
  if (match > 0 && length - match <= h->ring_mask && h->ring[match & h->ring_mask] == next) {
    *at = match + 1;
    *count = least((int64_t)matched + 1, LONGEST);
    return;
  }
  const uint32_t found = h->table[hash], oldest = length > h->ring_mask ? length - h->ring_mask : 0;
  if (length + 1 < h->cursor[ORDER] || found <= oldest || found > length) return;
  if (h->ring[(found - 1) & h->ring_mask] != next) return;
  uint32_t i = 1; /* tokens that are equal */
  while (i < LONGEST && found - i > oldest &&
         h->ring[(found - 1 - i) & h->ring_mask] == h->ring[(length - i) & h->ring_mask])
    i++;
  if (i < h->cursor[ORDER]) return;
  *at = found;
  *count = i;
}

static void append(const History *h, int32_t token) {
  const uint32_t hash = hash_of(h, token);
  match_next(h, token, hash, &h->cursor[MATCH], &h->cursor[MATCHED]);
  h->ring[h->cursor[LENGTH]++ & h->ring_mask] = token;
  if (h->cursor[LENGTH] >= h->cursor[ORDER]) h->table[hash] = h->cursor[LENGTH];
}

/* Put `next` and at most `limit` tokens that may follow it into `to`; return their number. */
static int64_t draft(const History *h, int32_t next, int64_t limit, int32_t *to) {
  uint32_t at, matched;
  match_next(h, next, hash_of(h, next), &at, &matched);
  to[0] = next;
  const uint32_t length = h->cursor[LENGTH];
  const int64_t count = at == 0 ? 0 : least(limit, (int64_t)matched - h->cursor[ORDER] + 1);
  for (int64_t i = 0; i < count; i++) { /* a match that overlaps what it predicts repeats itself */
    const uint32_t ahead = at + i - length;
    to[1 + i] = ahead <= i ? to[ahead] : h->ring[(at + i) & h->ring_mask];
  }
  return 1 + (count > 0 ? count : 0);
}

/* (tokens [N, T], counts [N], next [N], limits [N], history [N, R], table [N, M], cursor [N, 4])
   -> (next and drafts [N, W], their number [N], history, table, cursor), all int32: see
   `ops/draft.py`. */
XLA_FFI_Error *simplernn_draft(XLA_FFI_CallFrame *frame) {
  if (is_done(frame)) return NULL;
  Call call = begin(frame, "simplernn_draft", "tokens", 1, 7, 5);
  const int64_t T = axis_of(&call, 0, 0, 1), R = axis_of(&call, 0, 4, 1), M = axis_of(&call, 0, 5, 1);
  const int64_t W = axis_of(&call, 1, 0, 1), sizes[] = {T, 0, 0, 0, R, M, CURSOR};
  if (call.num_leading != 1) reject(&call, "%s: tokens: expected [N, T]", call.function);
  reject_empty(&call, least(least(T, W), least(R, M)));
  if ((R & (R - 1)) != 0 || (M & (M - 1)) != 0 || R > 1 << 30 || M > 1 << 30)
    reject(&call, "%s: history: sizes are not powers of 2", call.function);
  int32_t *data[7], *results[5];
  for (int i = 0; i < 7; i++)
    data[i] = checked(&call, buffer_at(&call, 0, i, "an argument"), "an argument",
                      XLA_FFI_DataType_S32, 1, (Shape){sizes[i] > 0, sizes + i});
  for (int i = 0; i < 5; i++)
    results[i] = checked(&call, buffer_at(&call, 1, i, "a result"), "a result",
                         XLA_FFI_DataType_S32, 1,
                         i == 0 ? SHAPE(W) : (Shape){i > 1, sizes + 2 + i});
  if (!is_valid(&call)) return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, call.error);
  for (int i = 4; i < 7; i++)
    if (results[i - 2] != data[i])
      memcpy(results[i - 2], data[i], sizeof(int32_t) * call.batch * sizes[i]);
  memset(results[0], 0, sizeof(int32_t) * call.batch * W);
  for (int64_t n = 0; n < call.batch; n++) {
    uint32_t *cursor = (uint32_t *)results[4] + n * CURSOR;
    cursor[ORDER] = cursor[ORDER] < 1 ? 1 : least(cursor[ORDER], LONGEST);
    const History h = {.ring = results[2] + n * R, .table = (uint32_t *)results[3] + n * M,
                       .cursor = cursor, .ring_mask = R - 1, .table_mask = M - 1};
    for (int64_t t = 0; t < least(data[1][n], T); t++) append(&h, data[0][n * T + t]);
    results[1][n] = draft(&h, data[2][n], least(data[3][n], W - 1), results[0] + n * W);
  }
  return NULL;
}
