#include "io/shard_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "core/error.h"

namespace k2 {
namespace {

// What O_DIRECT asks of offset, length and address: the largest block of the disks that there are.
constexpr int64_t kDirectAlign = 4096;

// The same file opened a second time, whatever its name means by now.
int reopen_direct(int fd) { return open(text("/proc/self/fd/", fd).c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT); }

// For files of others the kernel says that every page is in the cache.
bool residency_is_told(int fd, const struct stat& info) {
  return geteuid() == 0 || info.st_uid == geteuid() || faccessat(fd, "", W_OK, AT_EACCESS | AT_EMPTY_PATH) == 0;
}

uint8_t* reserve_staging(HugeBuffer& staging, int64_t bytes) {
  reserve(staging, size_t(bytes));
  return staging.data();
}

// Reads until `bytes` are there, the file ends, or reading fails; the number of bytes, or -1 with errno.
int64_t read_fully(int fd, uint8_t* out, int64_t bytes, int64_t offset, int64_t align) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t count = pread(fd, out + done, size_t(bytes - done), offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -1;
    done += count;
    if (count == 0 || count % align != 0) break;  // a direct read ends within a block at the end of the file only
  }
  return done;
}

}  // namespace

ShardFile::ShardFile(int fd, ReadMode mode) : fd_(fd), mode_(mode) {
  if (mode == ReadMode::kBuffered) return;
  direct_fd_ = reopen_direct(fd);
  struct stat info;
  if (mode == ReadMode::kDirect || fstat(fd, &info) != 0 || info.st_size <= 0 || !residency_is_told(fd, info)) return;
  void* mapping = mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
  if (mapping == MAP_FAILED) return;
  mapping_ = static_cast<uint8_t*>(mapping);
  mapping_bytes_ = info.st_size;
}

ShardFile::~ShardFile() {
  if (mapping_) munmap(mapping_, size_t(mapping_bytes_));
  if (direct_fd_ >= 0) close(direct_fd_);
}

ReadFrom ShardFile::locate(int64_t offset, int64_t bytes) const {
  const bool cache = mode_ == ReadMode::kBuffered || (mode_ == ReadMode::kAuto && in_cache(offset, bytes));
  return cache ? ReadFrom::kCache : ReadFrom::kDisk;
}

bool ShardFile::in_cache(int64_t offset, int64_t bytes) const {
  if (!inside(offset, bytes)) return false;
  const int64_t page = sysconf(_SC_PAGESIZE), first = offset / page * page;
  std::vector<unsigned char> resident(size_t((offset + bytes - first + page - 1) / page));
  if (mincore(mapping_ + first, size_t(offset + bytes - first), resident.data()) != 0) return false;
  for (const unsigned char flags : resident) {
    if (!(flags & 1)) return false;
  }
  return true;
}

bool ShardFile::inside(int64_t offset, int64_t bytes) const {
  return mapping_ && offset >= 0 && bytes > 0 && offset + bytes <= mapping_bytes_;
}

const uint8_t* ShardFile::read(int64_t offset, int64_t bytes, ReadFrom from, HugeBuffer& staging) const {
  int64_t done = -1, skip = 0;
  if (from == ReadFrom::kDisk && direct()) {
    const int64_t first = offset / kDirectAlign * kDirectAlign;
    skip = offset - first;
    const int64_t whole = (skip + bytes + kDirectAlign - 1) / kDirectAlign * kDirectAlign;
    done = read_fully(direct_fd_, reserve_staging(staging, whole), whole, first, kDirectAlign);
    if (done >= 0) done = std::max<int64_t>(0, done - skip);
  }
  if (done < 0) {  // also where the file system refuses a direct read that it let us open
    skip = 0;
    done = read_fully(fd_, reserve_staging(staging, bytes), bytes, offset, 1);
    if (done < 0) throw ReadError(text("cannot be read: ", std::strerror(errno)));
    if (from == ReadFrom::kDisk) static_cast<void>(posix_fadvise(fd_, offset, bytes, POSIX_FADV_DONTNEED));
  }
  if (done < bytes) throw ReadError(text("expected ", bytes, " bytes, got ", done));
  return staging.data() + skip;
}

FetchWindow::FetchWindow(const ShardFile& file, int64_t offset, int64_t bytes) {
#if defined(MADV_POPULATE_READ)
  if (!file.inside(offset, bytes)) return;
  const int64_t page = sysconf(_SC_PAGESIZE);
  FetchWindow window;
  window.mapping_ = file.mapping_;
  window.first_ = offset / page * page;
  window.last_ = offset + bytes;
  // Fails, without a signal, where the file has become too short, and on kernels before 5.14. Pages that came before that
  // go with the window.
  if (madvise(window.mapping_ + window.first_, size_t(window.last_ - window.first_), MADV_POPULATE_READ) != 0) return;
  *this = std::move(window);
#else
  static_cast<void>(file), static_cast<void>(offset), static_cast<void>(bytes);
#endif
}

FetchWindow::~FetchWindow() {
  if (mapping_) static_cast<void>(madvise(mapping_ + first_, size_t(last_ - first_), MADV_DONTNEED));
}

FetchWindow& FetchWindow::operator=(FetchWindow&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(first_, other.first_);
  std::swap(last_, other.last_);
  return *this;
}

}  // namespace k2
