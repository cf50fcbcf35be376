/* Preloaded: the process kills itself in the midst of its n-th write to a file or socket. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static long writes_left = -1; /* below 0: for ever */

void arm(long writes) { writes_left = writes; }

__attribute__((constructor)) static void arm_by_environment(void) {
    const char *writes = getenv("KILL_AT_WRITE");
    if (writes)
        arm(atol(writes));
}

static int is_last(void) {
    return writes_left >= 0 && __sync_fetch_and_sub(&writes_left, 1) == 0;
}

static int is_file(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
}

#define WRITE(result, name, counts, types, all, half)                       \
    result name types {                                                     \
        result (*real) types = (result (*) types)dlsym(RTLD_NEXT, #name);   \
        if ((counts) && is_last()) {                                        \
            half;                                                           \
            kill(getpid(), SIGKILL);                                        \
        }                                                                   \
        return real all;                                                    \
    }

WRITE(ssize_t, write, is_file(fd), (int fd, const void *data, size_t size),
      (fd, data, size), real(fd, data, size / 2))
WRITE(ssize_t, pwrite, 1, (int fd, const void *data, size_t size, off_t at),
      (fd, data, size, at), real(fd, data, size / 2, at))
WRITE(ssize_t, pwrite64, 1, (int fd, const void *data, size_t size, off_t at),
      (fd, data, size, at), real(fd, data, size / 2, at))
WRITE(ssize_t, send, 1, (int fd, const void *data, size_t size, int flags),
      (fd, data, size, flags), real(fd, data, size / 2, flags))
WRITE(int, fdatasync, is_file(fd), (int fd), (fd), (void)0)
WRITE(int, fsync, is_file(fd), (int fd), (fd), (void)0)
WRITE(int, ftruncate64, 1, (int fd, off_t size), (fd, size), (void)0)
