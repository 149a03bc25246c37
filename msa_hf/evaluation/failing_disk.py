"""A disk that fails on demand: a small library between a process and its C library, to test durability.

`library` compiles it; a process that was started with it in LD_PRELOAD controls it through `FailingDisk`.
Python, SQLite and safetensors write through these calls alike, but safetensors renames without the C library.
Only files below one folder are concerned.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

CALLS = (
    "open write pwrite fsync fdatasync rename unlink ftruncate mkdir fallocate read pread".split()
)  # as numbered in C
WRITING = (1 << CALLS.index("read")) - 1  # bits of the calls that change something
READING = (1 << CALLS.index("read")) | (1 << CALLS.index("pread"))
KILL = -1  # instead of an errno: the process dies by SIGKILL, in a write after half of it

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum {
    OPEN, WRITE, PWRITE, FSYNC, FDATASYNC, RENAME, UNLINK, FTRUNCATE, MKDIR, FALLOCATE, READ, PREAD, KINDS
};

static char folder[PATH_MAX];
static int wanted, failure, forever, failed = -1;
static long left, counts[KINDS];

void disk_fail(const char *path, int kinds, long nth, int error, int always) {
    snprintf(folder, sizeof folder, "%s", path);
    wanted = kinds; left = nth; failure = error; forever = always;
    failed = -1;
    memset(counts, 0, sizeof counts);
}

long disk_count(int kind) { return counts[kind]; }

/* The first call that failed, or -1. */
int disk_failed(void) { return failed; }

/* Whether this call is to fail; `path` may be NULL, then `fd` tells the file. */
static int fails(int kind, const char *path, int fd) {
    char own[PATH_MAX], link[64];
    if (!folder[0] || !(wanted & 1 << kind)) return 0;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, own, sizeof own - 1);
        if (length < 0) return 0;
        own[length] = 0;
        path = own;
    }
    if (strncmp(path, folder, strlen(folder))) return 0;
    counts[kind]++;
    left--;
    if (left > 0 || (left < 0 && !forever)) return 0;
    if (failed < 0) failed = kind;
    if (failure < 0 && kind != WRITE && kind != PWRITE) kill(getpid(), SIGKILL);
    errno = failure;
    return 1;
}

#define NEXT(name) ({ \
        static __typeof__(&name) next; \
        if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
        next; \
    })
#define REPLACE(type, name, kind, path, fd, parameters, arguments) \
    type name parameters { if (fails(kind, path, fd)) return -1; return NEXT(name) arguments; }

#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && fails(OPEN, path, -1)) return -1; \
        return NEXT(name)(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && fails(OPEN, path, -1)) return -1; \
        return NEXT(name)(at, path, flags, mode); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    if (fails(WRITE, NULL, fd)) {
        if (failure >= 0) return -1;
        NEXT(write)(fd, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return NEXT(write)(fd, data, size);
}

#define POSITIONED(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset) { \
        if (fails(PWRITE, NULL, fd)) { \
            if (failure >= 0) return -1; \
            NEXT(name)(fd, data, size / 2, offset); \
            kill(getpid(), SIGKILL); \
        } \
        return NEXT(name)(fd, data, size, offset); \
    }
POSITIONED(pwrite, off_t)
POSITIONED(pwrite64, off64_t)

REPLACE(int, fsync, FSYNC, NULL, fd, (int fd), (fd))
REPLACE(int, fdatasync, FDATASYNC, NULL, fd, (int fd), (fd))
REPLACE(int, rename, RENAME, to, -1, (const char *from, const char *to), (from, to))
REPLACE(int, renameat, RENAME, to, -1, (int a, const char *from, int b, const char *to), (a, from, b, to))
REPLACE(int, unlink, UNLINK, path, -1, (const char *path), (path))
REPLACE(int, unlinkat, UNLINK, path, -1, (int at, const char *path, int flags), (at, path, flags))
REPLACE(int, ftruncate, FTRUNCATE, NULL, fd, (int fd, off_t size), (fd, size))
REPLACE(int, ftruncate64, FTRUNCATE, NULL, fd, (int fd, off64_t size), (fd, size))
REPLACE(int, mkdir, MKDIR, path, -1, (const char *path, mode_t mode), (path, mode))
REPLACE(int, posix_fallocate, FALLOCATE, NULL, fd, (int fd, off_t offset, off_t size), (fd, offset, size))
REPLACE(ssize_t, read, READ, NULL, fd, (int fd, void *data, size_t size), (fd, data, size))
REPLACE(ssize_t, pread, PREAD, NULL, fd, (int fd, void *to, size_t size, off_t at), (fd, to, size, at))
REPLACE(ssize_t, pread64, PREAD, NULL, fd, (int fd, void *to, size_t size, off64_t at), (fd, to, size, at))
"""


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def library(folder: Path) -> Path:
    """Compiles the library into `folder`."""
    source, target = folder / "failing_disk.c", folder / "failing_disk.so"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run(
        [compiler(), "-shared", "-fPIC", "-O1", "-o", str(target), str(source), "-ldl"], check=True
    )
    return target


class FailingDisk:
    """The library that this process was started with."""

    def __init__(self):
        self._library = ctypes.CDLL(None)
        self._library.disk_fail.argtypes = [
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_int,
        ]
        self._library.disk_count.restype = ctypes.c_long

    def fail(self, folder: Path, nth: int, error: int, *, always: bool = False, kinds: int = WRITING) -> None:
        """From now on the nth call on a file below `folder` fails; if `always`, all later ones, too."""
        self._library.disk_fail(str(folder).encode(), kinds, nth, error, always)

    def failed(self) -> str | None:
        """The call that failed first since `fail`; None as long as there was none."""
        number = self._library.disk_failed()
        return None if number < 0 else CALLS[number]

    def stop(self) -> dict[str, int]:
        """Lets everything succeed again; how many calls of each kind there were."""
        counts = {name: self._library.disk_count(number) for number, name in enumerate(CALLS)}
        self._library.disk_fail(b"", 0, 0, 0, 0)
        return counts
