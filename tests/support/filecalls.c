/* Records the calls by which a process changes files below one folder, and fails chosen ones.
 *
 * Preloaded (LD_PRELOAD) into a child by tests/support/filecalls.rs, which also reads the log; the two
 * share the layout of `struct entry` and the order of `enum kind`.
 *
 *   STEMKV_FILECALLS_ROOT  the folder; calls elsewhere pass through
 *   STEMKV_FILECALLS_LOG   where the log goes; without it nothing is recorded
 *   STEMKV_FILECALLS_MARKS a file beside the folder: what the process writes to it becomes a mark in
 *                          the log, or, where it starts with '!', an order to this library:
 *       !fault CLASS PATH NTH TIMES ERRNO   fails TIMES calls (-1: all) of CLASS, from the NTH on, whose
 *                                           path contains PATH; with ERRNO 0 they hang until !clear,
 *                                           and then do what they should
 *       !count                              puts "MATCHED FAILED\n" into the file
 *       !clear                              the same, and ends the faults
 *
 * One lock is held across each call and its entry, so the log has the calls in an order in which they
 * could have happened one by one. A mark therefore stands behind every call that returned before it.
 *
 * What cannot be seen is refused (io_uring) or logged as UNSEEN, which ends the test: mappings that
 * write, copies within the kernel, stdio.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE, WRITE, TRUNCATE, SYNC, SYNC_ALL, LINK, RENAME, UNLINK, MKDIR, RMDIR, MARK, UNSEEN };

struct entry {
    uint32_t kind, path_bytes, data_bytes, direct;
    uint64_t inode;
    int64_t offset;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cleared = PTHREAD_COND_INITIALIZER;
static int log_fd = -1;
static char root[PATH_MAX], marks[PATH_MAX];
static size_t root_bytes;

static struct {
    int on, nth, times, error, matched, failed;
    char class[16], path[256];
} fault;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("STEMKV_FILECALLS_ROOT"), *log = getenv("STEMKV_FILECALLS_LOG");
    const char *file = getenv("STEMKV_FILECALLS_MARKS");
    if (file) snprintf(marks, sizeof marks, "%s", file);
    if (log) log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
    if (folder) {
        snprintf(root, sizeof root, "%s", folder);
        root_bytes = strlen(root);
    }
}

static int is_ours(const char *path) {
    return root_bytes && !strncmp(path, root, root_bytes) && (path[root_bytes] == '/' || !path[root_bytes]);
}

/* The path of a descriptor, as the kernel knows it now. */
static const char *path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t bytes = readlink(link, out, PATH_MAX - 1);
    out[bytes < 0 ? 0 : bytes] = 0;
    return out;
}

/* An absolute path for one that is relative to a folder's descriptor. */
static const char *path_at(int dirfd, const char *path, char *out) {
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else {
        char folder[PATH_MAX];
        if (dirfd == AT_FDCWD) {
            if (!getcwd(folder, sizeof folder)) folder[0] = 0;
        } else {
            path_of(dirfd, folder);
        }
        snprintf(out, PATH_MAX, "%.2000s/%.2000s", folder, path);
    }
    return out;
}

static void record(enum kind kind, int direct, uint64_t inode, const char *path, int64_t offset, const void *data, size_t bytes) {
    if (log_fd < 0) return;
    struct entry entry = {kind, path ? strlen(path) : 0, bytes, direct, inode, offset};
    struct iovec parts[3] = {{&entry, sizeof entry}, {(void *)path, entry.path_bytes}, {(void *)data, bytes}};
    /* Appended whole or the test is worth nothing. */
    if (syscall(SYS_writev, log_fd, parts, 3) != (long)(sizeof entry + entry.path_bytes + bytes)) abort();
}

static int is(const char *a, const char *b) { return !strcmp(a, b); }

/* Is a call of that class among those that fail? "create" is an opening that may change something;
 * "change" is all that a file system refuses which was mounted read-only. */
static int is_meant(const char *class) {
    if (is(fault.class, "any")) return !is(class, "thread");
    if (is(fault.class, "open")) return is(class, "open") || is(class, "create") || is(class, "list");
    if (is(fault.class, "change"))
        return !is(class, "open") && !is(class, "list") && !is(class, "read") && !is(class, "sync") && !is(class, "range") && !is(class, "thread");
    return is(fault.class, class);
}

/* With the lock held, which it lets go of while the call hangs: is this call to fail? Sets errno. */
static int fails(const char *class, const char *path) {
    if (!fault.on || !strstr(path, fault.path) || !is_meant(class)) return 0;
    fault.matched++;
    if (fault.matched < fault.nth || (fault.times >= 0 && fault.failed >= fault.times)) return 0;
    fault.failed++;
    if (!fault.error) {
        while (fault.on && !fault.error) pthread_cond_wait(&cleared, &lock);
        return 0;
    }
    errno = fault.error;
    return 1;
}

static void mark(int fd, const char *text, size_t bytes) {
    char line[512];
    snprintf(line, sizeof line, "%.*s", (int)bytes, text);
    if (line[0] != '!') {
        record(MARK, 0, 0, 0, 0, text, bytes);
    } else if (!strncmp(line, "!clear", 6) || !strncmp(line, "!count", 6)) {
        int ends = line[2] == 'l', length = snprintf(line, sizeof line, "%d %d\n", fault.matched, fault.failed);
        if (syscall(SYS_ftruncate, fd, 0) || syscall(SYS_pwrite64, fd, line, length, 0) != length) abort();
        if (ends) memset(&fault, 0, sizeof fault);
        if (ends) pthread_cond_broadcast(&cleared);
    } else {
        memset(&fault, 0, sizeof fault);
        if (sscanf(line, "!fault %15s %255s %d %d %d", fault.class, fault.path, &fault.nth, &fault.times, &fault.error) != 5) abort();
        fault.on = 1;
    }
}

/* Opening. */

static int open_any(int dirfd, const char *path, int flags, mode_t mode) {
    char at[PATH_MAX];
    if (!is_ours(path_at(dirfd, path, at))) return syscall(SYS_openat, dirfd, path, flags, mode);
    pthread_mutex_lock(&lock);
    int fd = -1;
    int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (!fails(changes ? "create" : "open", at)) {
        struct stat before, now;
        int existed = !stat(at, &before);
        fd = syscall(SYS_openat, dirfd, path, flags, mode);
        if (fd >= 0 && !fstat(fd, &now)) {
            if ((flags & O_TMPFILE) == O_TMPFILE) record(UNSEEN, 0, 0, "O_TMPFILE", 0, 0, 0);
            else if ((flags & O_CREAT) && !existed) record(CREATE, 0, now.st_ino, at, 0, 0, 0);
            else if ((flags & O_TRUNC) && before.st_size) record(TRUNCATE, 0, now.st_ino, 0, 0, 0, 0);
        }
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, int); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int fd, const char *path, int flags, ...) { MODE(flags) return open_any(fd, path, flags, mode); }
int openat64(int fd, const char *path, int flags, ...) { MODE(flags) return open_any(fd, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

DIR *opendir(const char *path) {
    REAL(opendir);
    char at[PATH_MAX];
    if (!is_ours(path_at(AT_FDCWD, path, at))) return real(path);
    pthread_mutex_lock(&lock);
    int failed = fails("list", at), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed ? 0 : real(path);
}

/* Threads that are asked for with attributes: Rust's, not those of C++. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*work)(void *), void *with) {
    REAL(pthread_create);
    pthread_mutex_lock(&lock);
    int error = attributes && fails("thread", "/") ? errno : 0;
    pthread_mutex_unlock(&lock);
    return error ? error : real(thread, attributes, work, with);
}

static void unseen(const char *what, const char *path) {
    if (is_ours(path)) record(UNSEEN, 0, 0, what, 0, 0, 0);
}

FILE *fopen(const char *path, const char *mode) {
    REAL(fopen);
    if (strpbrk(mode, "wa+")) unseen("fopen", path);
    return real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(fopen64);
    if (strpbrk(mode, "wa+")) unseen("fopen", path);
    return real(path, mode);
}

/* Data. Every call that changes, or reads, a file by its descriptor has this form. */

#define BEGIN(class) \
    char at[PATH_MAX]; \
    path_of(fd, at); \
    int ours = is_ours(at), error; \
    if (ours) pthread_mutex_lock(&lock); \
    __typeof__(done) result = -1; \
    if (!ours || !fails(class, at)) { \
        result = done;

#define END \
    } \
    error = errno; \
    if (ours) pthread_mutex_unlock(&lock); \
    errno = error; \
    return result;

static uint64_t inode_of(int fd) {
    struct stat now;
    return fstat(fd, &now) ? 0 : now.st_ino;
}

static int is_direct(int fd) { return (fcntl(fd, F_GETFL) & O_DIRECT) != 0; }

/* `bytes` of `parts`, written at `offset`. */
static void wrote(int fd, const struct iovec *parts, int count, size_t bytes, int64_t offset) {
    for (int i = 0; i < count && bytes; i++) {
        size_t part = parts[i].iov_len < bytes ? parts[i].iov_len : bytes;
        record(WRITE, is_direct(fd), inode_of(fd), 0, offset, parts[i].iov_base, part);
        offset += part;
        bytes -= part;
    }
}

static ssize_t write_any(int fd, const struct iovec *parts, int count, int64_t offset, int flags) {
    char at[PATH_MAX];
    path_of(fd, at);
    if (marks[0] && count == 1 && !strcmp(at, marks)) {
        pthread_mutex_lock(&lock);
        mark(fd, parts->iov_base, parts->iov_len);
        pthread_mutex_unlock(&lock);
        return parts->iov_len;
    }
    int ours = is_ours(at);
    if (ours) pthread_mutex_lock(&lock);
    ssize_t result = -1;
    if (!ours || !fails("write", at)) {
        result = offset < 0 ? syscall(SYS_writev, fd, parts, count)
                            : syscall(SYS_pwritev2, fd, parts, count, (long)offset, 0L, flags);
        if (ours && result > 0) {
            int64_t start = offset < 0 ? lseek(fd, 0, SEEK_CUR) - result : offset;
            wrote(fd, parts, count, result, start);
        }
    }
    int error = errno;
    if (ours) pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

ssize_t write(int fd, const void *data, size_t bytes) {
    struct iovec part = {(void *)data, bytes};
    return write_any(fd, &part, 1, -1, 0);
}
ssize_t writev(int fd, const struct iovec *parts, int count) { return write_any(fd, parts, count, -1, 0); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
    struct iovec part = {(void *)data, bytes};
    return write_any(fd, &part, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset) { return pwrite(fd, data, bytes, offset); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return write_any(fd, parts, count, offset, 0); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) { return write_any(fd, parts, count, offset, 0); }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) { return write_any(fd, parts, count, offset, flags); }
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) { return write_any(fd, parts, count, offset, flags); }

static int read_fails(int fd) {
    if (!fault.on || (strcmp(fault.class, "read") && strcmp(fault.class, "any"))) return 0;
    char at[PATH_MAX];
    if (!is_ours(path_of(fd, at))) return 0;
    pthread_mutex_lock(&lock);
    int failed = fails("read", at), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed;
}

ssize_t read(int fd, void *to, size_t bytes) { return read_fails(fd) ? -1 : syscall(SYS_read, fd, to, bytes); }
ssize_t pread(int fd, void *to, size_t bytes, off_t offset) { return read_fails(fd) ? -1 : syscall(SYS_pread64, fd, to, bytes, offset); }
ssize_t pread64(int fd, void *to, size_t bytes, off64_t offset) { return read_fails(fd) ? -1 : syscall(SYS_pread64, fd, to, bytes, offset); }
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) { return read_fails(fd) ? -1 : syscall(SYS_preadv, fd, parts, count, (long)offset, 0L); }
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) { return read_fails(fd) ? -1 : syscall(SYS_preadv, fd, parts, count, (long)offset, 0L); }
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) { return read_fails(fd) ? -1 : syscall(SYS_preadv2, fd, parts, count, (long)offset, 0L, flags); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) { return read_fails(fd) ? -1 : syscall(SYS_preadv2, fd, parts, count, (long)offset, 0L, flags); }

#define done (int)syscall(SYS_ftruncate, fd, (long)length)
int ftruncate(int fd, off_t length) {
    BEGIN("truncate")
    if (ours && !result) record(TRUNCATE, 0, inode_of(fd), 0, length, 0, 0);
    END
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
#undef done

int truncate(const char *path, off_t length) {
    int fd = open_any(AT_FDCWD, path, O_WRONLY, 0);
    if (fd < 0) return -1;
    int result = ftruncate(fd, length), error = errno;
    close(fd);
    errno = error;
    return result;
}
int truncate64(const char *path, off64_t length) { return truncate(path, length); }

#define done (int)syscall(SYS_fallocate, fd, mode, (long)offset, (long)bytes)
int fallocate(int fd, int mode, off_t offset, off_t bytes) {
    BEGIN("allocate")
    struct stat now;
    /* A hole reads as zeros, and arrives as a write of them would: any part of it. */
    int hole = mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
    if (ours && !result && hole) {
        void *zeros = calloc(1, bytes);
        if (!zeros) abort();
        record(WRITE, 0, inode_of(fd), 0, offset, zeros, bytes);
        free(zeros);
    }
    if (ours && !result && (mode & ~FALLOC_FL_KEEP_SIZE) && !hole) unseen("fallocate of another mode", at);
    /* Setting aside space changes no byte but the length. */
    if (ours && !result && !mode && !fstat(fd, &now)) record(TRUNCATE, 0, now.st_ino, 0, now.st_size, 0, 0);
    END
}
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes) { return fallocate(fd, mode, offset, bytes); }
#undef done
int posix_fallocate(int fd, off_t offset, off_t bytes) { return fallocate(fd, 0, offset, bytes) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t bytes) { return posix_fallocate(fd, offset, bytes); }

#define done (int)syscall(SYS_fsync, fd)
int fsync(int fd) {
    BEGIN("sync")
    if (ours && !result) record(SYNC, 0, inode_of(fd), at, 0, 0, 0);
    END
}
#undef done
#define done (int)syscall(SYS_fdatasync, fd)
int fdatasync(int fd) {
    BEGIN("sync")
    if (ours && !result) record(SYNC, 0, inode_of(fd), at, 0, 0, 0);
    END
}
#undef done
#define done (int)syscall(SYS_syncfs, fd)
int syncfs(int fd) {
    BEGIN("sync")
    if (ours && !result) record(SYNC_ALL, 0, 0, 0, 0, 0, 0);
    END
}
#undef done
/* Promises nothing after a power cut: passes through unrecorded. */
#define done (int)syscall(SYS_sync_file_range, fd, (long)offset, (long)bytes, flags)
int sync_file_range(int fd, off64_t offset, off64_t bytes, unsigned flags) {
    BEGIN("range")
    END
}
#undef done

/* Names. */

#define NAME_CALL(class, path, call, on_success) \
    pthread_mutex_lock(&lock); \
    int result = -1; \
    if (!fails(class, path)) { \
        result = call; \
        if (!result) on_success; \
    } \
    int error = errno; \
    pthread_mutex_unlock(&lock); \
    errno = error; \
    return result;

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    path_at(from_fd, from, a);
    path_at(to_fd, to, b);
    if (!is_ours(a) && !is_ours(b)) return syscall(SYS_renameat2, from_fd, from, to_fd, to, flags);
    NAME_CALL("rename", b, syscall(SYS_renameat2, from_fd, from, to_fd, to, flags),
              record(flags & RENAME_EXCHANGE ? UNSEEN : RENAME, 0, 0, a, 0, b, strlen(b)))
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) { return renameat2(from_fd, from, to_fd, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    char a[PATH_MAX], b[PATH_MAX];
    path_at(from_fd, from, a);
    path_at(to_fd, to, b);
    if (!is_ours(b)) return syscall(SYS_linkat, from_fd, from, to_fd, to, flags);
    NAME_CALL("link", b, syscall(SYS_linkat, from_fd, from, to_fd, to, flags),
              record(is_ours(a) ? LINK : UNSEEN, 0, 0, a, 0, b, strlen(b)))
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int fd, const char *path, int flags) {
    char at[PATH_MAX];
    if (!is_ours(path_at(fd, path, at))) return syscall(SYS_unlinkat, fd, path, flags);
    NAME_CALL("unlink", at, syscall(SYS_unlinkat, fd, path, flags),
              record(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, 0, at, 0, 0, 0))
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    struct stat meta;
    return lstat(path, &meta) ? -1 : unlinkat(AT_FDCWD, path, S_ISDIR(meta.st_mode) ? AT_REMOVEDIR : 0);
}

int mkdirat(int fd, const char *path, mode_t mode) {
    char at[PATH_MAX];
    struct stat there;
    /* A read-only file system says first that the name is taken. */
    int is_taken = is(fault.class, "change") && !stat(path_at(fd, path, at), &there);
    if (is_taken || !is_ours(path_at(fd, path, at))) return syscall(SYS_mkdirat, fd, path, mode);
    NAME_CALL("mkdir", at, syscall(SYS_mkdirat, fd, path, mode), record(MKDIR, 0, 0, at, 0, 0, 0))
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int symlink(const char *target, const char *path) {
    REAL(symlink);
    unseen("symlink", path);
    return real(target, path);
}

/* What would change bytes unseen. */

static void unseen_fd(const char *what, int fd) {
    char at[PATH_MAX];
    unseen(what, path_of(fd, at));
}

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_TYPE) != MAP_PRIVATE) unseen_fd("mmap", fd);
    return (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, (long)offset);
}
void *mmap64(void *at, size_t bytes, int protection, int flags, int fd, off64_t offset) {
    return mmap(at, bytes, protection, flags, fd, offset);
}
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t bytes, unsigned flags) {
    unseen_fd("copy_file_range", to);
    return syscall(SYS_copy_file_range, from, from_at, to, to_at, bytes, flags);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t bytes) {
    unseen_fd("sendfile", to);
    return syscall(SYS_sendfile, to, from, offset, bytes);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t bytes) { return sendfile(to, from, (off_t *)offset, bytes); }

long syscall(long number, ...) {
    REAL(syscall);
    long word[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) word[i] = va_arg(rest, long);
    va_end(rest);
    /* Writes through a ring could not be seen: as in a container whose seccomp filter refuses it. */
    if (number == SYS_io_uring_setup) {
        errno = ENOSYS;
        return -1;
    }
    if (number == SYS_copy_file_range) unseen_fd("copy_file_range", word[2]);
    return real(number, word[0], word[1], word[2], word[3], word[4], word[5]);
}
