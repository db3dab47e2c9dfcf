/* Library for LD_PRELOAD: calls that write below a folder fail.

   The environment variable FAULTS is "FIRST COUNT ERRNO RECORD FOLDER": of all calls that write
   below FOLDER, by all processes together, the FIRST-th (from 1) and the COUNT - 1 that follow it
   fail with ERRNO. If the FIRST-th writes data and more than one call fails, it writes half of the
   data, as on a disk that is full then.

   RECORD is a file of RECORD_BYTES that the processes share: the number of calls, and the name and
   path of the FIRST-th. The standard streams are not counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define RECORD_BYTES 8192

struct record {
    atomic_long calls;
    char first[RECORD_BYTES - sizeof(long)];
};

static long first, count;
static int number;
static char folder[PATH_MAX];
static struct record *record; /* NULL before the constructor has run, and without FAULTS */

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("FAULTS");
    char path[PATH_MAX];
    const char *format = "%ld %ld %d %4095s %4095s";
    if (!text || sscanf(text, format, &first, &count, &number, path, folder) != 5)
        return;
    int file = open(path, O_RDWR | O_CLOEXEC);
    void *memory = mmap(NULL, RECORD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || memory == MAP_FAILED) abort();
    close(file);
    record = memory;
}

/* 0, or the error of this call; `name` is NULL for the descriptor itself. */
static int failure(const char *call, int file, const char *name) {
    if (!record || (!name && file <= 2)) return 0;
    char link[64], path[2 * PATH_MAX] = "";
    size_t length = strlen(folder);
    if (!name || name[0] != '/') { /* the path of the descriptor, or of the current folder */
        snprintf(link, sizeof link, file == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", file);
        ssize_t end = readlink(link, path, PATH_MAX - 1);
        path[end < 0 ? 0 : end] = 0;
    }
    if (name) {
        size_t end = strlen(path);
        snprintf(path + end, PATH_MAX, "%s%s", end ? "/" : "", name);
    }
    if (strncmp(path, folder, length) || path[length] != '/') return 0;
    long call_number = atomic_fetch_add(&record->calls, 1) + 1;
    if (call_number == first)
        snprintf(record->first, sizeof record->first, "%s %s", call, path + length + 1);
    return call_number < first || call_number - first >= count ? 0 : number;
}

/* The function of the same name in the next library, as `next`. */
#define NEXT(name)                 \
    static __typeof__(name) *next; \
    if (!next) next = dlsym(RTLD_NEXT, #name)
#define FAIL_OR_CALL(name, file, path, failed_result, ...) \
    int failed = failure(#name, file, path);               \
    if (!failed) return next(__VA_ARGS__);                 \
    errno = failed;                                        \
    return failed_result

/* Functions by what they change, an open file or a path in a folder; arguments come last. */
#define OF_FILE(result, name, parameters, ...)         \
    result name parameters {                           \
        NEXT(name);                                    \
        FAIL_OR_CALL(name, file, NULL, -1, __VA_ARGS__); \
    }
#define OF_PATH(name, parameters, at, ...)           \
    int name parameters {                            \
        NEXT(name);                                  \
        FAIL_OR_CALL(name, at, path, -1, __VA_ARGS__); \
    }
#define OPENS(name, parameters, at, ...)                                                      \
    int name parameters {                                                                     \
        NEXT(name);                                                                           \
        va_list rest;                                                                         \
        va_start(rest, flags);                                                                \
        mode_t mode = va_arg(rest, mode_t); /* without one, what happens to be in its place */ \
        va_end(rest);                                                                         \
        int writes = flags & (O_CREAT | O_TRUNC) || (flags & O_TMPFILE) == O_TMPFILE;         \
        if (!writes) return next(__VA_ARGS__, mode);                         \
        FAIL_OR_CALL(name, at, path, -1, __VA_ARGS__, mode);                                  \
    }

ssize_t write(int file, const void *data, size_t size) {
    NEXT(write);
    int failed = failure("write", file, NULL);
    if (failed && size > 1 && count > 1 && atomic_load(&record->calls) == first) {
        failed = 0;
        size /= 2;
    }
    if (!failed) return next(file, data, size);
    errno = failed;
    return -1;
}
size_t fwrite(const void *data, size_t size, size_t n, FILE *stream) {
    NEXT(fwrite); /* which does not call the functions here */
    FAIL_OR_CALL(fwrite, fileno(stream), NULL, 0, data, size, n, stream);
}
int fclose(FILE *stream) {
    NEXT(fclose);
    int flags = record ? fcntl(fileno(stream), F_GETFL) : -1;
    int failed = flags != -1 && flags & O_ACCMODE ? failure("fclose", fileno(stream), NULL) : 0;
    int result = next(stream); /* what a closed stream has buffered is lost with its error */
    if (failed) errno = failed;
    return failed ? EOF : result;
}

OF_FILE(ssize_t, pwrite, (int file, const void *data, size_t n, off_t at), file, data, n, at)
OF_FILE(ssize_t, pwrite64, (int file, const void *data, size_t n, off64_t at), file, data, n, at)
OF_FILE(ssize_t, writev, (int file, const struct iovec *parts, int n), file, parts, n)
OF_FILE(ssize_t, pwritev, (int file, const struct iovec *parts, int n, off_t at), file, parts, n,
        at)
OF_FILE(ssize_t, pwritev64, (int file, const struct iovec *parts, int n, off64_t at), file, parts,
        n, at)
OF_FILE(ssize_t, sendfile, (int file, int from, off_t *at, size_t n), file, from, at, n)
OF_FILE(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t n), file, from, at, n)
OF_FILE(ssize_t, copy_file_range,
        (int from, off64_t *at, int file, off64_t *to, size_t n, unsigned flags), from, at, file,
        to, n, flags)
OF_FILE(int, ftruncate, (int file, off_t size), file, size)
OF_FILE(int, ftruncate64, (int file, off64_t size), file, size)
OF_FILE(int, fsync, (int file), file)
OF_FILE(int, fdatasync, (int file), file)
OF_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, mode)
OF_PATH(mkdirat, (int at, const char *path, mode_t mode), at, at, path, mode)
OF_PATH(rename, (const char *old, const char *path), AT_FDCWD, old, path)
OF_PATH(renameat, (int from, const char *old, int at, const char *path), at, from, old, at, path)
OPENS(open, (const char *path, int flags, ...), AT_FDCWD, path, flags)
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD, path, flags)
OPENS(openat, (int at, const char *path, int flags, ...), at, at, path, flags)
OPENS(openat64, (int at, const char *path, int flags, ...), at, at, path, flags)
