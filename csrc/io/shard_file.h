// Reading a file that is far larger than the memory it passes through, without leaving a copy in the page cache.
//
// What the cache holds already is copied from there. The rest is read past the cache (O_DIRECT), or, where the file
// system cannot, through it and dropped from it at once: weights fill most of the memory and have no room for a second
// copy of themselves.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "core/huge_buffer.h"

namespace k2 {

// A read that failed or came to the file's end too early; names neither tensor nor file.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class ReadMode {
  kAuto,      // as above
  kBuffered,  // everything through the page cache, to be compared with
  kDirect,    // everything past it where the file system can
};

enum class ReadFrom { kCache, kDisk };

class ShardFile {
 public:
  // `fd` is open for reading, stays the caller's and outlives this object. Never fails: what cannot be found out or
  // opened here is read through the cache.
  ShardFile(int fd, ReadMode mode);
  ~ShardFile();
  ShardFile(const ShardFile&) = delete;
  ShardFile& operator=(const ShardFile&) = delete;

  // Where these bytes are to be read from.
  ReadFrom locate(int64_t offset, int64_t bytes) const;

  // Reads bytes [offset, offset + bytes) into `staging`, which grows as needed, and returns where they begin there.
  // ReadError. Thread-safe with a staging buffer of one's own.
  const uint8_t* read(int64_t offset, int64_t bytes, ReadFrom from, HugeBuffer& staging) const;

  bool direct() const { return direct_fd_ >= 0; }

 private:
  friend class FetchWindow;
  bool in_cache(int64_t offset, int64_t bytes) const;
  bool inside(int64_t offset, int64_t bytes) const;  // of the mapping

  const int fd_;
  const ReadMode mode_;
  int direct_fd_ = -1;
  uint8_t* mapping_ = nullptr;  // never read: it names the pages that mincore is asked about, and those to be fetched
  int64_t mapping_bytes_ = 0;
};

// A range of a file that lies in the page cache, where the processor can fetch it into its own caches while it does
// something else. Its pages count as the process's memory as long as this exists; the file has to exist as long.
class FetchWindow {
 public:
  FetchWindow() = default;
  // Empty where the system cannot; never fails.
  FetchWindow(const ShardFile& file, int64_t offset, int64_t bytes);
  ~FetchWindow();
  FetchWindow(FetchWindow&& other) noexcept { *this = std::move(other); }
  FetchWindow& operator=(FetchWindow&& other) noexcept;

  // Where a byte of the file is to be fetched, null outside. For prefetch instructions alone: where the file was cut
  // short meanwhile a read would end the process, and they do nothing.
  const uint8_t* at(int64_t offset) const { return offset >= first_ && offset < last_ ? mapping_ + offset : nullptr; }

 private:
  uint8_t* mapping_ = nullptr;
  int64_t first_ = 0, last_ = 0;  // from the beginning of a page
};

}  // namespace k2
