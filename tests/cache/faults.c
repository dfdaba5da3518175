// Preloaded over libc: the n-th call of one kind on a file under one folder fails, or writes only half.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char kind[16], folder[4096];
static int left, code, fired, links = 1;

void fault_set(const char *k, int nth, int error, const char *under) {
  snprintf(kind, sizeof kind, "%s", k), snprintf(folder, sizeof folder, "%s", under);
  left = nth, code = error, fired = 0;
}
int fault_fired(void) { return fired; }
void fault_links(int allowed) { links = allowed; }  // 0: a file system without hard links

static int due(const char *k, const char *path) {
  if (!left || strcmp(kind, k) || strncmp(path, folder, strlen(folder)) || --left) return 0;
  fired = 1, errno = code;
  return 1;
}
static int due_fd(const char *k, int fd) {
  char name[64], path[4096];
  if (!left) return 0;
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(name, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return due(k, path);
}
#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)

ssize_t write(int fd, const void *data, size_t n) {
  if (due_fd("write", fd)) return -1;
  if (n > 1 && due_fd("short", fd)) n /= 2;
  return REAL(write, fd, data, n);
}
ssize_t pread64(int fd, void *data, size_t n, off64_t at) {
  if (due_fd("read", fd)) return -1;
  return REAL(pread64, fd, data, n, at);
}
int fsync(int fd) { return due_fd("fsync", fd) ? -1 : REAL(fsync, fd); }
int ftruncate64(int fd, off64_t n) { return due_fd("truncate", fd) ? -1 : REAL(ftruncate64, fd, n); }
int rename(const char *a, const char *b) { return due("rename", a) ? -1 : REAL(rename, a, b); }
int linkat(int d, const char *a, int e, const char *b, int f) {
  if (!links) return errno = EPERM, -1;
  return due("link", a) ? -1 : REAL(linkat, d, a, e, b, f);
}
int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return due("open", path) ? -1 : REAL(open64, path, flags, mode);
}
