// Experts read from files at odd places, past and through the page cache, and files that fail; for the sanitizers.
#include "io/expert_reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;

std::vector<uint8_t> random_bytes(Random& random, int64_t bytes) {
  std::vector<uint8_t> out(static_cast<size_t>(bytes));
  for (uint8_t& byte : out) byte = uint8_t(random());
  return out;
}

// A file in the working folder that is gone when the test ends.
struct File {
  explicit File(const std::vector<uint8_t>& bytes) : fd(open("shard", O_CREAT | O_TRUNC | O_RDWR, 0600)) {
    K2_EXPECT(fd >= 0 && unlink("shard") == 0);
    K2_EXPECT(write(fd, bytes.data(), bytes.size()) == ssize_t(bytes.size()));
  }
  ~File() { close(fd); }

  // Whether the system could be made to forget what it holds of the file.
  bool evict(const ShardFile& reader, int64_t bytes) const {
    K2_EXPECT(fdatasync(fd) == 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    return reader.locate(0, bytes) == ReadFrom::kDisk;
  }

  const int fd;
};

constexpr ReadMode kModes[] = {ReadMode::kAuto, ReadMode::kBuffered, ReadMode::kDirect};
constexpr ReadFrom kPlaces[] = {ReadFrom::kCache, ReadFrom::kDisk};

void every_range_is_read(Random& random) {
  const std::vector<uint8_t> bytes = random_bytes(random, 20000 + int64_t(random() % 20000));
  const File file(bytes);
  HugeBuffer staging;
  for (const ReadMode mode : kModes) {
    const ShardFile reader(file.fd, mode);
    for (int round = 0; round < 200; ++round) {
      const int64_t offset = int64_t(random() % bytes.size()), left = int64_t(bytes.size()) - offset;
      const int64_t count = round % 8 ? 1 + int64_t(random() % uint64_t(left)) : left;
      const uint8_t* got = reader.read(offset, count, kPlaces[random() % 2], staging);
      K2_EXPECT(std::memcmp(got, bytes.data() + offset, size_t(count)) == 0);
    }
  }
}

void the_cache_is_used_and_not_filled(Random& random) {
  const int64_t bytes = 1 << 20;
  const File file(random_bytes(random, bytes));
  const ShardFile reader(file.fd, ReadMode::kAuto);
  K2_EXPECT(reader.locate(1, bytes - 1) == ReadFrom::kCache);  // it was just written
  K2_EXPECT(reader.locate(1, bytes) == ReadFrom::kDisk);       // ends behind the file
  if (!file.evict(reader, bytes)) return;                       // a file system in memory
  HugeBuffer staging;
  reader.read(5000, bytes - 5000, reader.locate(5000, bytes - 5000), staging);
  K2_EXPECT(reader.locate(8192, bytes - 8192) == ReadFrom::kDisk);
}

void a_file_may_be_cut_short_under_a_window(Random& random) {
  const int64_t bytes = 1 << 20;
  const std::vector<uint8_t> content = random_bytes(random, bytes);
  const File file(content);
  const ShardFile reader(file.fd, ReadMode::kAuto);
  const ShardFile buffered(file.fd, ReadMode::kBuffered);
  const FetchWindow window(reader, 5000, 600000), beyond(reader, 5000, bytes), plain(buffered, 0, 1);
  K2_EXPECT(!window.at(4095) && !window.at(605000) && !beyond.at(5000) && !plain.at(0));
  if (!window.at(5000)) return;  // an old kernel
  K2_EXPECT(std::memcmp(window.at(5000), content.data() + 5000, 600000) == 0);
  K2_EXPECT(ftruncate(file.fd, 100) == 0);
  for (int64_t at = 5000; at < 605000; at += 64) __builtin_prefetch(window.at(at));
  K2_EXPECT(!FetchWindow(reader, 5000, 600000).at(5000));
}

// Bytes of the file that count as this process's memory.
size_t mapped_bytes(const std::string& path) {
  std::ifstream smaps("/proc/self/smaps");
  size_t kib = 0, sum = 0;
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    uintptr_t first, last;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &first, &last) == 2) {
      inside = line.find(path) != std::string::npos;
    } else if (inside && std::sscanf(line.c_str(), "Rss: %zu kB", &kib) == 1) {
      sum += kib * 1024;
    }
  }
  return sum;
}

// But for a few beside it, which the kernel maps with the first and the last.
void a_window_leaves_no_pages_behind(Random& random) {
  const int64_t size = 3 << 20;
  const size_t few = 1 << 20;
  const File file(random_bytes(random, size + 10000));
  const ShardFile reader(file.fd, ReadMode::kAuto);
  const std::string path = std::filesystem::read_symlink(text("/proc/self/fd/", file.fd));
  {
    const FetchWindow window(reader, 5000, size);
    if (!window.at(5000) || mapped_bytes(path) < size_t(size)) return;  // an old kernel, or one that does not say
  }
  K2_EXPECT(mapped_bytes(path) < few);
  K2_EXPECT(ftruncate(file.fd, size - 100000) == 0);
  K2_EXPECT(!FetchWindow(reader, 5000, size).at(5000));  // fails near its end
  K2_EXPECT(mapped_bytes(path) < few);
}

std::string failure(const ShardFile& file, int64_t offset, int64_t bytes, ReadFrom from) {
  HugeBuffer staging;
  try {
    file.read(offset, bytes, from, staging);
  } catch (const ReadError& error) {
    return error.what();
  }
  return "";
}

void a_file_that_ends_early_is_refused(Random& random) {
  const File file(random_bytes(random, 10000));
  for (const ReadMode mode : kModes) {
    const ShardFile reader(file.fd, mode);
    for (const ReadFrom from : kPlaces) {
      K2_EXPECT(failure(reader, 9000, 1000, from) == "");
      K2_EXPECT(failure(reader, 9000, 1001, from) == "expected 1001 bytes, got 1000");
      K2_EXPECT(failure(reader, 9999, 5000, from) == "expected 5000 bytes, got 1");
      K2_EXPECT(failure(reader, 10000, 1, from) == "expected 1 bytes, got 0");
      K2_EXPECT(failure(reader, 70000, 100, from) == "expected 100 bytes, got 0");
    }
  }
}

void a_failing_read_is_refused() {
  const int folder = open(".", O_RDONLY | O_DIRECTORY);
  K2_EXPECT(folder >= 0);
  for (const ReadMode mode : kModes) {
    const ShardFile reader(folder, mode);
    for (const ReadFrom from : kPlaces) K2_EXPECT(failure(reader, 0, 100, from) == "cannot be read: Is a directory");
  }
  close(folder);
}

// The tensors of an expert in a file, in random order and with random gaps.
struct StoredBytes {
  StoredBytes(Random& random, const LayerShape& s) {
    const int64_t words = int64_t(s.hidden) * s.intermediate / 2, scales = int64_t(s.hidden) * s.intermediate / 16;
    bytes = random_bytes(random, int64_t(random() % 9000));
    int order[] = {0, 1, 2, 3, 4, 5};
    std::shuffle(order, order + 6, random);
    for (const int i : order) {
      offset[i] = int64_t(bytes.size());
      size[i] = i % 2 ? scales : words;
      std::vector<uint8_t> part = random_bytes(random, size[i]);
      if (i % 2) {
        for (size_t at = 1; at < part.size(); at += 2) part[at] = uint8_t((part[at] & 0x83) | 0x38);  // small and finite
      }
      bytes.insert(bytes.end(), part.begin(), part.end());
      bytes.resize(bytes.size() + random() % 70);
    }
  }

  StoredExpert stored(int fd) const {
    auto tensor = [&](int i) {
      return StoredTensor{i % 2 ? text("scales", i / 2) : text("words", i / 2), "shard", fd, offset[i], size[i]};
    };
    return {{tensor(0), tensor(1)}, {tensor(2), tensor(3)}, {tensor(4), tensor(5)}};
  }

  template <class T>
  std::vector<T> copy(int i) const {
    std::vector<T> out(size_t(size[i]) / sizeof(T));
    std::memcpy(out.data(), bytes.data() + offset[i], size_t(size[i]));
    return out;
  }

  std::vector<uint8_t> bytes;
  int64_t offset[6], size[6];
};

void pack_from_memory(const StoredBytes& file, ExpertLayer& layer, int expert) {
  const LayerShape& s = layer.shape();
  const std::vector<uint32_t> words[] = {file.copy<uint32_t>(0), file.copy<uint32_t>(2), file.copy<uint32_t>(4)};
  const std::vector<uint16_t> scales[] = {file.copy<uint16_t>(1), file.copy<uint16_t>(3), file.copy<uint16_t>(5)};
  auto matrix = [&](int i, int rows, int inputs) {
    return PackedMatrix{.words = words[i].data(), .scales = scales[i].data(), .rows = rows, .inputs = inputs};
  };
  layer.pack(expert, matrix(0, s.intermediate, s.hidden), matrix(1, s.intermediate, s.hidden),
             matrix(2, s.hidden, s.intermediate));
}

void an_expert_is_read_as_it_is_packed(Random& random) {
  // The larger one takes several pieces of both sizes.
  const LayerShape shapes[] = {{96, 64, 2, 1}, {32, 32, 2, 1}, {2048, 4224, 2, 1}};
  for (const LayerShape& shape : shapes) {
    ExpertLayer layer(shape);
    const StoredBytes bytes(random, shape);
    const File file(bytes.bytes);
    pack_from_memory(bytes, layer, 0);
    for (const ReadMode mode : kModes) {
      read_expert(bytes.stored(file.fd), mode, layer, 1);
      K2_EXPECT(layer.checksum(1) == layer.checksum(0) && layer.memory_checksum(1) == layer.checksum(0));
    }
    const ShardFile reader(file.fd, ReadMode::kAuto);
    static_cast<void>(file.evict(reader, int64_t(bytes.bytes.size())));
    read_expert(bytes.stored(file.fd), ReadMode::kAuto, layer, 1);
    K2_EXPECT(layer.checksum(1) == layer.checksum(0));
  }
}

std::string refusal(const StoredExpert& stored, ReadMode mode, ExpertLayer& layer) {
  layer.finish(0);
  try {
    read_expert(stored, mode, layer, 0);
  } catch (const WeightError& error) {
    K2_EXPECT(!layer.loaded(0));
    return error.what();
  }
  return "";
}

void what_is_wrong_with_an_expert_is_placed(Random& random) {
  const LayerShape shape{96, 64, 1, 1};
  ExpertLayer layer(shape);
  for (const ReadMode mode : kModes) {
    StoredBytes bytes(random, shape);
    for (int i = 0; i < 6; ++i) {
      const File cut(std::vector<uint8_t>(bytes.bytes.begin(), bytes.bytes.begin() + bytes.offset[i] + 7));
      StoredExpert stored = bytes.stored(cut.fd);
      StoredTensor* tensors[] = {&stored.gate.words, &stored.gate.scales, &stored.up.words,
                                 &stored.up.scales,  &stored.down.words,  &stored.down.scales};
      const File whole(bytes.bytes);
      for (StoredTensor* tensor : tensors) tensor->fd = whole.fd;
      tensors[i]->fd = cut.fd;
      const std::string name = i % 2 ? "scales" : "words";
      K2_EXPECT(refusal(stored, mode, layer) ==
                text(name, i / 2, ": expected ", bytes.size[i], " bytes, got 7 (in shard)"));
    }
    const int64_t at = bytes.offset[3] + 2 * (17 * 3 + 2);  // up, row 17, group 2
    bytes.bytes[size_t(at)] = 0xc1, bytes.bytes[size_t(at) + 1] = 0x7f;
    const File file(bytes.bytes);
    K2_EXPECT(refusal(bytes.stored(file.fd), mode, layer) ==
              "scales1: scale of row 17, group 2: expected a finite number below 256 in magnitude, got NaN (in shard)");
  }
}

void a_tensor_of_another_size_is_refused(Random& random) {
  const LayerShape shape{96, 64, 1, 1};
  ExpertLayer layer(shape);
  const StoredBytes bytes(random, shape);
  const File file(bytes.bytes);
  StoredExpert stored = bytes.stored(file.fd);
  stored.down.scales.bytes -= 2;
  bool refused = false;
  try {
    read_expert(stored, ReadMode::kAuto, layer, 0);
  } catch (const ArgumentError& error) {
    refused = std::string(error.what()) == "scales2: expected 384 bytes, got 382";
  }
  K2_EXPECT(refused);
}

}  // namespace
}  // namespace k2

int main(int, char** arguments) {  // folder for files, seed
  K2_EXPECT(chdir(arguments[1]) == 0);
  k2::Random random(std::stoull(arguments[2]));
  k2::every_range_is_read(random);
  k2::the_cache_is_used_and_not_filled(random);
  k2::a_file_may_be_cut_short_under_a_window(random);
  k2::a_window_leaves_no_pages_behind(random);
  k2::a_file_that_ends_early_is_refused(random);
  k2::a_failing_read_is_refused();
  for (int round = 0; round < 3; ++round) k2::an_expert_is_read_as_it_is_packed(random);
  k2::what_is_wrong_with_an_expert_is_placed(random);
  k2::a_tensor_of_another_size_is_refused(random);
  std::puts("ok");
}
