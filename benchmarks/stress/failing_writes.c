/* Library for LD_PRELOAD: one or more consecutive writes below a folder fail.

   The environment variable FAILING_WRITES is "FIRST COUNT ERRNO RECORD FOLDER": of all calls that
   write below FOLDER, by all processes together, the FIRST-th (from 1) and the COUNT - 1 that
   follow it fail with ERRNO. If the FIRST-th writes data and more than one call fails, it writes
   half of the data, as on a disk that is full then. With a negative ERRNO none fails, and each takes
   -ERRNO microseconds more.

   RECORD is a file of RECORD_BYTES that the processes share: the number of calls, and the name and
   path of the FIRST-th. The standard streams are not counted. Other calls go on to the kernel,
   those of buffered streams of C (fwrite) to glibc, which does not call the functions here. */

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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define RECORD_BYTES 8192

struct record {
    atomic_long calls;
    char first[RECORD_BYTES - sizeof(long)];
};

static long first, count;
static int error;
static char folder[PATH_MAX];
static struct record *record;

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("FAILING_WRITES");
    char path[PATH_MAX];
    if (!text || sscanf(text, "%ld %ld %d %4095s %4095s", &first, &count, &error, path, folder) != 5)
        return;
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    void *memory = mmap(NULL, RECORD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || memory == MAP_FAILED) abort();
    close(file);
    record = memory;
}

/* Path of a file descriptor, or of the current folder, into PATH_MAX bytes. */
static void path_of(int file, char *path) {
    char link[64];
    if (file == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

/* 0, or the error of this call; `name` is NULL for the descriptor itself. */
static int failure(const char *call, int file, const char *name) {
    if (!record || (!name && file <= 2)) return 0;
    char path[2 * PATH_MAX] = "";
    if (!name || name[0] != '/') path_of(file, path);
    if (name) {
        size_t length = strlen(path);
        snprintf(path + length, PATH_MAX, "%s%s", length ? "/" : "", name);
    }
    size_t length = strlen(folder);
    if (strncmp(path, folder, length) || path[length] != '/') return 0;
    long number = atomic_fetch_add(&record->calls, 1) + 1;
    if (number == first)
        snprintf(record->first, sizeof record->first, "%s %s", call, path + length + 1);
    if (number < first || number - first >= count) return 0;
    if (error >= 0) return error;
    usleep(-error);
    return 0;
}

#define FAIL_OR(call, file, name, result)             \
    int failed = failure(call, file, name);           \
    if (failed) {                                     \
        errno = failed;                               \
        return -1;                                    \
    }                                                 \
    return result

ssize_t write(int file, const void *data, size_t size) {
    int failed = failure("write", file, NULL);
    if (failed && size > 1 && count > 1 && atomic_load(&record->calls) == first)
        return syscall(SYS_write, file, data, size / 2);
    if (failed) {
        errno = failed;
        return -1;
    }
    return syscall(SYS_write, file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    FAIL_OR("pwrite", file, NULL, syscall(SYS_pwrite64, file, data, size, at));
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    FAIL_OR("writev", file, NULL, syscall(SYS_writev, file, parts, number));
}
ssize_t pwritev(int file, const struct iovec *parts, int number, off_t at) {
    FAIL_OR("pwritev", file, NULL, syscall(SYS_pwritev, file, parts, number, at, 0));
}
ssize_t sendfile(int output, int input, off_t *at, size_t size) {
    FAIL_OR("sendfile", output, NULL, syscall(SYS_sendfile, output, input, at, size));
}
ssize_t copy_file_range(int input, off_t *from, int output, off_t *to, size_t size, unsigned flags) {
    FAIL_OR("copy_file_range", output, NULL,
            syscall(SYS_copy_file_range, input, from, output, to, size, flags));
}
int ftruncate(int file, off_t size) {
    FAIL_OR("ftruncate", file, NULL, syscall(SYS_ftruncate, file, size));
}
int fallocate(int file, int mode, off_t from, off_t size) {
    FAIL_OR("fallocate", file, NULL, syscall(SYS_fallocate, file, mode, from, size));
}
int fsync(int file) { FAIL_OR("fsync", file, NULL, syscall(SYS_fsync, file)); }
int fdatasync(int file) { FAIL_OR("fdatasync", file, NULL, syscall(SYS_fdatasync, file)); }

/* What a closed stream has buffered is lost with its error. */
size_t fwrite(const void *data, size_t size, size_t number, FILE *stream) {
    static size_t (*next)(const void *, size_t, size_t, FILE *);
    if (!next) next = dlsym(RTLD_NEXT, "fwrite");
    int failed = record ? failure("fwrite", fileno(stream), NULL) : 0;
    if (failed) errno = failed;
    return failed ? 0 : next(data, size, number, stream);
}
int fclose(FILE *stream) {
    static int (*next)(FILE *);
    if (!next) next = dlsym(RTLD_NEXT, "fclose");
    int flags = record ? fcntl(fileno(stream), F_GETFL) : -1;
    int failed = flags != -1 && flags & O_ACCMODE ? failure("fclose", fileno(stream), NULL) : 0;
    int result = next(stream);
    if (!failed) return result;
    errno = failed;
    return EOF;
}

int mkdirat(int at, const char *name, mode_t mode) {
    FAIL_OR("mkdir", at, name, syscall(SYS_mkdirat, at, name, mode));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int renameat2(int from, const char *old, int to, const char *name, unsigned flags) {
    FAIL_OR("rename", to, name, syscall(SYS_renameat2, from, old, to, name, flags));
}
int renameat(int from, const char *old, int to, const char *name) {
    return renameat2(from, old, to, name, 0);
}
int rename(const char *old, const char *name) {
    return renameat2(AT_FDCWD, old, AT_FDCWD, name, 0);
}

static int open_mode(int at, const char *name, int flags, mode_t mode) {
    if (flags & (O_CREAT | O_TRUNC) || (flags & O_TMPFILE) == O_TMPFILE) {
        FAIL_OR("open", at, name, syscall(SYS_openat, at, name, flags, mode));
    }
    return syscall(SYS_openat, at, name, flags, mode);
}

#define OPEN(at)                        \
    va_list rest;                       \
    va_start(rest, flags);              \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest);                       \
    return open_mode(at, name, flags, mode)

int open(const char *name, int flags, ...) { OPEN(AT_FDCWD); }
int openat(int at, const char *name, int flags, ...) { OPEN(at); }
int creat(const char *name, mode_t mode) {
    return open_mode(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* On 64-bit Linux these are the same functions. */
#define SAME(other, name) extern __typeof__(name) other __attribute__((alias(#name)))
SAME(open64, open);
SAME(openat64, openat);
SAME(creat64, creat);
SAME(pwrite64, pwrite);
SAME(pwritev64, pwritev);
SAME(sendfile64, sendfile);
SAME(ftruncate64, ftruncate);
SAME(fallocate64, fallocate);
