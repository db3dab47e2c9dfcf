/* Buffers of a call, validated before use, so that a wrong call cannot access foreign memory. */

#ifndef SIMPLERNN_BUFFERS_H
#define SIMPLERNN_BUFFERS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define TOO_MANY INT64_MAX

/* Sums, products and quotients (rounded up) of sizes; TOO_MANY if they overflow, which a later
   check rejects. */
static inline int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? TOO_MANY : sum;
}

static inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? TOO_MANY : product;
}

static inline int64_t divided(int64_t n, int64_t by) { return n / by + (n % by > 0); }

typedef struct {
  XLA_FFI_CallFrame *frame;
  const char *function;
  const int64_t *leading; /* sizes of the batch axes, which all buffers share */
  int64_t num_leading, batch;
  int has_results; /* whether any result has entries */
  char error[512]; /* the first one; empty if none */
} Call;

typedef struct {
  int64_t rank;
  const int64_t *dims;
} Shape;

#define SHAPE(...)                                                 \
  ((Shape){sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), \
           (const int64_t[]){__VA_ARGS__}})

static inline int is_valid(const Call *call) { return call->error[0] == 0; }

__attribute__((format(printf, 2, 3))) static inline void reject(Call *call, const char *format,
                                                                ...) {
  if (!is_valid(call)) return;
  va_list values;
  va_start(values, format);
  vsnprintf(call->error, sizeof call->error, format, values);
  va_end(values);
}

static inline const char *name_of(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_F32:
      return "float32";
    case XLA_FFI_DataType_BF16:
      return "bfloat16";
    case XLA_FFI_DataType_S32:
      return "int32";
    case XLA_FFI_DataType_U32:
      return "uint32";
    case XLA_FFI_DataType_PRED:
      return "bool";
    default:
      return "another dtype";
  }
}

/* Format a shape, truncated to `size`. */
static inline void describe(char *text, size_t size, Shape leading, Shape tail) {
  size_t used = 0;
  text[0] = 0;
  for (int64_t i = 0; i < leading.rank + tail.rank && used < size; i++) {
    const int64_t dim = i < leading.rank ? leading.dims[i] : tail.dims[i - leading.rank];
    used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)dim);
  }
}

/* Argument or result i; NULL, and an error, if it is not a valid buffer. */
static inline const XLA_FFI_Buffer *buffer_at(Call *call, int is_result, int64_t i,
                                              const char *name) {
  if (!is_valid(call)) return NULL;
  const XLA_FFI_Args *args = &call->frame->args;
  const XLA_FFI_Rets *rets = &call->frame->rets;
  void **buffers = is_result ? rets->rets : args->args;
  const int64_t count = is_result ? rets->size : args->size;
  if (i >= count || buffers == NULL || buffers[i] == NULL ||
      (is_result ? rets->types[i] != XLA_FFI_RetType_BUFFER
                 : args->types[i] != XLA_FFI_ArgType_BUFFER)) {
    reject(call, "%s: %s: expected an array; got none", call->function, name);
    return NULL;
  }
  const XLA_FFI_Buffer *buffer = buffers[i];
  int64_t entries = 1;
  for (int64_t axis = 0; axis < buffer->rank; axis++) {
    if (buffer->dims[axis] < 0) entries = TOO_MANY;
    if (entries != TOO_MANY) entries = times(entries, buffer->dims[axis]);
  }
  if (buffer->rank < 0 || times(entries, sizeof(float)) == TOO_MANY)
    reject(call, "%s: %s: too large", call->function, name);
  else if (entries > 0 && buffer->data == NULL)
    reject(call, "%s: %s: has no memory", call->function, name);
  return is_valid(call) ? buffer : NULL;
}

static inline int64_t entries_of(const XLA_FFI_Buffer *buffer) {
  int64_t entries = 1;
  for (int64_t i = 0; i < buffer->rank; i++) entries *= buffer->dims[i];
  return entries;
}

/* Data of a buffer; an error unless it has `dtype`, and as its shape the first `num_leading` batch
   axes of the call, then `tail`. */
static inline void *checked(Call *call, const XLA_FFI_Buffer *buffer, const char *name,
                            XLA_FFI_DataType dtype, int64_t num_leading, Shape tail) {
  if (!is_valid(call) || buffer == NULL) return NULL;
  int fits = buffer->dtype == dtype && buffer->rank == num_leading + tail.rank;
  for (int64_t i = 0; fits && i < num_leading; i++) fits = buffer->dims[i] == call->leading[i];
  for (int64_t i = 0; fits && i < tail.rank; i++)
    fits = buffer->dims[num_leading + i] == tail.dims[i];
  if (fits) return buffer->data;
  char wanted[160], found[160];
  describe(wanted, sizeof wanted, (Shape){num_leading, call->leading}, tail);
  describe(found, sizeof found, (Shape){buffer->rank, buffer->dims}, (Shape){0, NULL});
  reject(call, "%s: %s: expected %s[%s]; got %s[%s]", call->function, name, name_of(dtype), wanted,
         name_of(buffer->dtype), found);
  return NULL;
}

/* Float32 argument ``[batch axes, tail]``. */
static inline const float *argument(Call *call, int64_t i, const char *name, Shape tail) {
  return checked(call, buffer_at(call, 0, i, name), name, XLA_FFI_DataType_F32, call->num_leading,
                 tail);
}

/* Float32 argument ``[shape]`` without batch axes. */
static inline const float *shared_argument(Call *call, int64_t i, const char *name, Shape shape) {
  return checked(call, buffer_at(call, 0, i, name), name, XLA_FFI_DataType_F32, 0, shape);
}

/* Float32 result ``[batch axes, tail]``. */
static inline float *result(Call *call, int64_t i, const char *name, Shape tail) {
  const XLA_FFI_Buffer *buffer = buffer_at(call, 1, i, name);
  if (buffer != NULL && entries_of(buffer) > 0) call->has_results = 1;
  return checked(call, buffer, name, XLA_FFI_DataType_F32, call->num_leading, tail);
}

/* A result that begins as an argument, which may have the same memory. */
static inline float *updated(Call *call, int64_t i, int64_t i_result, const char *name, Shape tail) {
  const float *from = argument(call, i, name, tail);
  float *to = result(call, i_result, name, tail);
  if (is_valid(call) && from != to && call->has_results) {
    int64_t count = call->batch;
    for (int64_t axis = 0; axis < tail.rank; axis++) count *= tail.dims[axis];
    memcpy(to, from, sizeof(float) * count);
  }
  return to;
}

/* Bool argument ``[batch axes, length]``; NULL if it is empty. */
static inline const uint8_t *flags(Call *call, int64_t i, const char *name, int64_t length) {
  const XLA_FFI_Buffer *buffer = buffer_at(call, 0, i, name);
  if (buffer == NULL) return NULL;
  if (buffer->dtype == XLA_FFI_DataType_PRED && entries_of(buffer) == 0) return NULL;
  return checked(call, buffer, name, XLA_FFI_DataType_PRED, call->num_leading, SHAPE(length));
}

/* Start a call whose first argument has `tail` axes after the batch axes. */
static inline Call begin(XLA_FFI_CallFrame *frame, const char *function, const char *first,
                         int64_t tail, int64_t args, int64_t results) {
  Call call = {.frame = frame, .function = function};
  if (frame->args.size != args || frame->rets.size != results) {
    reject(&call, "%s: expected %lld arguments and %lld results; got %lld and %lld", function,
           (long long)args, (long long)results, (long long)frame->args.size,
           (long long)frame->rets.size);
    return call;
  }
  const XLA_FFI_Buffer *buffer = buffer_at(&call, 0, 0, first);
  if (buffer == NULL) return call;
  if (buffer->rank < tail) {
    reject(&call, "%s: %s: expected at least %lld axes; got %lld", function, first,
           (long long)tail, (long long)buffer->rank);
    return call;
  }
  call.leading = buffer->dims;
  call.num_leading = buffer->rank - tail;
  call.batch = 1;
  for (int64_t i = 0; i < call.num_leading; i++) call.batch = times(call.batch, buffer->dims[i]);
  if (call.batch == TOO_MANY) reject(&call, "%s: %s: too large", function, first);
  return call;
}

/* Size of an axis, counted from 1 for the last; 0 if there is none. */
static inline int64_t axis_of(Call *call, int is_result, int64_t i, int64_t axis) {
  const XLA_FFI_Buffer *buffer = buffer_at(call, is_result, i, "an array");
  return buffer == NULL || buffer->rank < axis ? 0 : buffer->dims[buffer->rank - axis];
}

#endif
