/* XLA's calling convention: buffers of a call, validated before use, so that a wrong call cannot access
   foreign memory; and work sharing among XLA's threads. */

#ifndef SIMPLERNN_CALL_H
#define SIMPLERNN_CALL_H

#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "xla/ffi/api/c_api.h"

/* Sizes of arrays that have memory, and products of a few of them, fit 64 bits. */

/* n / by, rounded up. */
static inline int64_t divided(int64_t n, int64_t by) { return n / by + (n % by > 0); }

typedef struct {
  XLA_FFI_CallFrame *frame;
  const char *function;
  const int64_t *leading; /* sizes of the batch axes, which all buffers share */
  int64_t num_leading, batch;
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

/* Argument or result i; NULL, and an error, if it is not an array. */
static inline const XLA_FFI_Buffer *buffer_at(Call *call, int is_result, int64_t i,
                                              const char *name) {
  if (!is_valid(call)) return NULL;
  const XLA_FFI_Args *args = &call->frame->args;
  const XLA_FFI_Rets *rets = &call->frame->rets;
  if (is_result && i < rets->size && rets->types[i] == XLA_FFI_RetType_BUFFER) return rets->rets[i];
  if (!is_result && i < args->size && args->types[i] == XLA_FFI_ArgType_BUFFER) return args->args[i];
  reject(call, "%s: %s: not an array", call->function, name);
  return NULL;
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
  if (!fits) reject(call, "%s: %s: wrong shape or dtype", call->function, name);
  return fits ? buffer->data : NULL;
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
  return checked(call, buffer_at(call, 1, i, name), name, XLA_FFI_DataType_F32, call->num_leading,
                 tail);
}

/* Float32 result ``[shape]`` that begins as an argument, which may have the same memory. */
static inline float *updated(Call *call, int64_t i, int64_t i_result, const char *name, Shape shape) {
  const float *from = shared_argument(call, i, name, shape);
  const XLA_FFI_Buffer *buffer = buffer_at(call, 1, i_result, name);
  float *to = checked(call, buffer, name, XLA_FFI_DataType_F32, 0, shape);
  if (is_valid(call) && from != to) memcpy(to, from, sizeof(float) * entries_of(buffer));
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
  if (frame->args.size != args || frame->rets.size != results)
    reject(&call, "%s: wrong number of arguments or results", function);
  const XLA_FFI_Buffer *buffer = buffer_at(&call, 0, 0, first);
  if (buffer != NULL && buffer->rank < tail) reject(&call, "%s: %s: too few axes", function, first);
  if (!is_valid(&call)) return call;
  call.leading = buffer->dims;
  call.num_leading = buffer->rank - tail;
  call.batch = 1;
  for (int64_t i = 0; i < call.num_leading; i++) call.batch *= buffer->dims[i];
  return call;
}

/* Size of an axis, counted from 1 for the last; 0 if there is none. */
static inline int64_t axis_of(Call *call, int is_result, int64_t i, int64_t axis) {
  const XLA_FFI_Buffer *buffer = buffer_at(call, is_result, i, "an array");
  return buffer == NULL || buffer->rank < axis ? 0 : buffer->dims[buffer->rank - axis];
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Reject a call whose smallest size is not positive: loops and divisions rely on it. */
static inline void reject_empty(Call *call, int64_t smallest) {
  if (smallest < 1) reject(call, "%s: empty axes", call->function);
}

/* Work shared by threads, which take items one by one. The caller takes items too, so that a busy
   thread pool only slows it down. `task` must outlive the last item. Each thread begins with the same
   part of the items in every call, since what it wrote is in its own cache; then it helps others. */
#define MOST_PARTS 64
typedef struct {
  const void *task;
  void (*run)(const void *task, int64_t item, void *scratch);
  int64_t (*start)(const void *task, int64_t item); /* the items before it must be done before
                                                       this one; NULL: all are independent */
  int64_t items, threads;
  int64_t scratch_bytes; /* per thread, from `scratch_for`; may be 0 */
  int64_t parts;
  atomic_long next[MOST_PARTS], done, holders;
  atomic_int out_of_memory, has_waited;
} Work;

static void release(Work *work) {
  if (atomic_fetch_sub(&work->holders, 1) == 1) free(work);
}

/* Calls with dependent items that go without helpers, since other threads or processes made one wait
   for a helper: every dependence may then cost a time slice. Each such wait doubles the number of
   calls after the next one, up to MOST_ALONE, and each call without one halves it. */
static atomic_long calls_alone, next_alone = 1;
#define MOST_ALONE 64
#define PATIENCE 1e-3 /* seconds, longer than any item takes */

static double seconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

/* Spin for some microseconds, the time of a short item; then give others the processor. */
static void wait_for(Work *work, int64_t count) {
  double begin = 0;
  for (int64_t spins = 0; atomic_load_explicit(&work->done, memory_order_acquire) < count; spins++) {
    if (spins < 10000) continue;
    if (begin == 0) begin = seconds();
    sched_yield();
    if (seconds() - begin > PATIENCE) atomic_store(&work->has_waited, 1);
  }
}

static int64_t take_item(Work *work) {
  static atomic_long threads;
  static _Thread_local int64_t thread = -1;
  if (thread < 0) thread = atomic_fetch_add(&threads, 1);
  for (int64_t i = 0; i < work->parts; i++) {
    const int64_t part = (thread + i) % work->parts, first = work->items * part / work->parts;
    const int64_t size = work->items * (part + 1) / work->parts - first;
    if (atomic_load(&work->next[part]) >= size) continue;
    const int64_t item = atomic_fetch_add(&work->next[part], 1);
    if (item < size) return first + item;
  }
  return -1;
}

static void take_items(Work *work) {
  void *scratch = NULL;
  for (;;) {
    const int64_t item = take_item(work);
    if (item < 0) break;
    if (work->start != NULL) wait_for(work, work->start(work->task, item));
    if (scratch == NULL && work->scratch_bytes > 0)
      scratch = aligned_alloc(64, work->scratch_bytes);
    if (scratch == NULL && work->scratch_bytes > 0)
      atomic_store(&work->out_of_memory, 1);
    else
      work->run(work->task, item, scratch);
    atomic_fetch_add(&work->done, 1);
  }
  free(scratch);
}

/* Set `calls_alone` after a call with helpers. */
static void learn(int has_waited) {
  const long alone = atomic_load(&next_alone);
  if (has_waited) atomic_store(&calls_alone, alone);
  atomic_store(&next_alone, has_waited ? least(2 * alone, MOST_ALONE) : alone > 1 ? alone / 2 : 1);
}

static void help(void *data) {
  take_items(data);
  release(data);
}

static XLA_FFI_Error *fail(XLA_FFI_CallFrame *frame, XLA_FFI_Error_Code code, const char *message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

static void drop(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  frame->api->XLA_FFI_Error_Destroy(&args);
}

/* Bytes of scratch memory for aligned_alloc: a positive multiple of 64. */
static inline int64_t scratch_for(int64_t entries, int64_t size) {
  return (entries * size + 64) / 64 * 64;
}

/* Number of XLA's threads. */
static int64_t pool_size(XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL,
                                              frame->ctx, &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  if (error != NULL) drop(frame, error);
  return threads > 0 ? threads : 1;
}

/* Run `description` on at most `threads` threads, or return the error of the call. */
static XLA_FFI_Error *share(Call *call, const Work *description) {
  XLA_FFI_CallFrame *frame = call->frame;
  if (!is_valid(call)) return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, call->error);
  Work *work = malloc(sizeof(Work));
  if (work == NULL) return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
  *work = *description;
  int64_t helpers = least(least(pool_size(frame), work->items), work->threads) - 1;
  if (work->start != NULL && atomic_load(&calls_alone) > 0) {
    atomic_fetch_sub(&calls_alone, 1);
    helpers = 0;
  }
  work->parts = work->start != NULL || helpers < 1 ? 1 : least(1 + helpers, MOST_PARTS);
  for (int64_t i = 0; i < work->parts; i++) atomic_init(&work->next[i], 0);
  atomic_init(&work->done, 0);
  atomic_init(&work->out_of_memory, 0);
  atomic_init(&work->has_waited, 0);
  atomic_init(&work->holders, 1 + (helpers > 0 ? helpers : 0));
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL,
                                             frame->ctx, help, work};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (error != NULL) {
      drop(frame, error);
      release(work);
    }
  }
  take_items(work);
  wait_for(work, work->items);
  if (work->start != NULL && helpers > 0) learn(atomic_load(&work->has_waited));
  const int out_of_memory = atomic_load(&work->out_of_memory);
  release(work);
  if (out_of_memory) return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
  return NULL;
}

/* Whether there is nothing to compute: XLA queries the interface version before the first call, or no
   result has entries. */
static int is_done(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Metadata_Extension *query = (void *)frame->extension_start;
  if (query != NULL && query->extension_base.type == XLA_FFI_Extension_Metadata) {
    query->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    query->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    query->metadata->state_type_id.type_id = 0; /* stateless */
    return 1;
  }
  for (int64_t i = 0; i < frame->rets.size; i++)
    if (frame->rets.types[i] != XLA_FFI_RetType_BUFFER || entries_of(frame->rets.rets[i]) > 0)
      return 0;
  return 1;
}

#endif
