/* Lets the n-th system call on a file below a directory fail. Loaded with LD_PRELOAD; armed by fault_arm(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char prefix[4096];
static long calls, target = -1;
static int error, sticky, fired;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* From now on call `at` (the first is 0; -1: none) fails with `number`, and with `all` those after it too. What only
 * reads fails with EIO only. Without a number nothing fails, but no write writes more than half. */
void fault_arm(const char *directory, long at, int number, int all)
{
    pthread_mutex_lock(&mutex);
    snprintf(prefix, sizeof prefix, "%s/", directory);
    calls = fired = 0;
    target = at;
    error = number;
    sticky = all;
    pthread_mutex_unlock(&mutex);
}

/* How many calls there were; below zero if one of them failed. */
long fault_calls(void)
{
    return fired ? -calls : calls;
}

static int fails(const char *path)
{
    int now = 0;
    if (!prefix[0] || strncmp(path, prefix, strlen(prefix)) != 0)
        return 0;
    pthread_mutex_lock(&mutex);
    now = calls == target || (fired && sticky);
    calls++;
    fired |= now;
    pthread_mutex_unlock(&mutex);
    if (now)
        errno = error;
    return now;
}

static int fails_at(int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 2);
    if (length < 0)
        return 0;
    path[length] = '/';
    path[length + 1] = 0;
    return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* How much of it is written: what still fits, or half, or nothing. */
static ssize_t written(int fd, size_t size)
{
    int failed = fails_at(fd);
    if (failed && !(error == ENOSPC && size > 1) && error)
        return -1;
    return failed && size > 1 ? (ssize_t)(size / 2) : (ssize_t)size;
}

ssize_t write(int fd, const void *data, size_t size)
{
    ssize_t some = written(fd, size);
    return some < 0 ? -1 : REAL(write)(fd, data, (size_t)some);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    ssize_t some = written(fd, size);
    return some < 0 ? -1 : REAL(pwrite64)(fd, data, (size_t)some, offset);
}

ssize_t read(int fd, void *data, size_t size)
{
    return error == EIO && fails_at(fd) ? -1 : REAL(read)(fd, data, size);
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset)
{
    return error == EIO && fails_at(fd) ? -1 : REAL(pread64)(fd, data, size, offset);
}

int ftruncate64(int fd, off64_t size)
{
    return error && fails_at(fd) ? -1 : REAL(ftruncate64)(fd, size);
}

int fsync(int fd)
{
    return error && fails_at(fd) ? -1 : REAL(fsync)(fd);
}

int fdatasync(int fd)
{
    return error && fails_at(fd) ? -1 : REAL(fdatasync)(fd);
}

int rename(const char *from, const char *to)
{
    return error && fails(to) ? -1 : REAL(rename)(from, to);
}

int unlink(const char *path)
{
    return error && fails(path) ? -1 : REAL(unlink)(path);
}

int mkdir(const char *path, mode_t mode)
{
    return error && fails(path) ? -1 : REAL(mkdir)(path, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    if (error && (flags & O_CREAT || error == EIO) && fails(path))
        return -1;
    return REAL(open64)(path, flags, mode);
}
