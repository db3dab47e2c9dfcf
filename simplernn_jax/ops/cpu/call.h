/* XLA's calling convention, and work sharing among its threads. */

#ifndef SIMPLERNN_CALL_H
#define SIMPLERNN_CALL_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "buffers.h"

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Work shared by threads, which take items one by one. The caller takes items too, so that a busy
   thread pool only slows it down. `task` must outlive the last item. */
typedef struct {
  const void *task;
  void (*run)(const void *task, int64_t item, void *scratch);
  int64_t (*start)(const void *task, int64_t item); /* the items before it must be done before
                                                       this one; NULL: all are independent */
  int64_t items, threads;
  int64_t scratch_bytes; /* per thread, from `scratch_for`; may be 0 */
  atomic_long next, done, holders;
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

static void take_items(Work *work) {
  void *scratch = NULL;
  for (;;) {
    int64_t item = atomic_fetch_add(&work->next, 1);
    if (item >= work->items) break;
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

/* Bytes of scratch memory for aligned_alloc: a positive multiple of 64, or TOO_MANY. */
static inline int64_t scratch_for(int64_t entries, int64_t size) {
  const int64_t bytes = plus(times(entries, size), 64);
  return bytes == TOO_MANY ? TOO_MANY : bytes / 64 * 64;
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

/* Run `description` on at most `threads` threads, or return the error of the call. Does nothing if
   no result has entries. */
static XLA_FFI_Error *share(Call *call, const Work *description) {
  XLA_FFI_CallFrame *frame = call->frame;
  if (is_valid(call) &&
      (description->items == TOO_MANY || description->scratch_bytes == TOO_MANY))
    reject(call, "%s: too large", call->function);
  if (!is_valid(call)) return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, call->error);
  if (!call->has_results) return NULL;
  Work *work = malloc(sizeof(Work));
  if (work == NULL) return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
  *work = *description;
  int64_t helpers = least(least(pool_size(frame), work->items), work->threads) - 1;
  if (work->start != NULL && atomic_load(&calls_alone) > 0) {
    atomic_fetch_sub(&calls_alone, 1);
    helpers = 0;
  }
  atomic_init(&work->next, 0);
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

/* Answer XLA's query of the interface version, which comes before the first call. */
static int is_metadata_query(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Metadata_Extension *query = (void *)frame->extension_start;
  if (query == NULL || query->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  query->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  query->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  query->metadata->state_type_id.type_id = 0; /* stateless */
  return 1;
}

#endif
