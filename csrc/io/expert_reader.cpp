#include "io/expert_reader.h"

#include <algorithm>
#include <initializer_list>
#include <list>

#include "core/error.h"

namespace k2 {
namespace {

// Bytes that are read before they are packed. From the page cache: what stays in a core's L2 cache until it is packed.
// From the disk: long enough that a few threads keep it busy.
constexpr int64_t kCachePiece = int64_t(256) << 10;
constexpr int64_t kDiskPiece = int64_t(8) << 20;

// The files of one expert, each opened once.
class Files {
 public:
  explicit Files(ReadMode mode) : mode_(mode) {}

  const ShardFile& of(const StoredTensor& tensor) {
    for (const auto& [fd, file] : open_) {
      if (fd == tensor.fd) return file;
    }
    return open_.emplace_back(std::piecewise_construct, std::tuple(tensor.fd), std::tuple(tensor.fd, mode_)).second;
  }

 private:
  const ReadMode mode_;
  std::list<std::pair<int, ShardFile>> open_;
};

// One matrix and the rows of it that are in memory.
class MatrixReader {
 public:
  MatrixReader(const StoredMatrix& stored, Files& files, int rows, int inputs)
      : stored_(stored), words_file_(files.of(stored.words)), scales_file_(files.of(stored.scales)), inputs_(inputs) {
    check_size(stored.words, rows * words_row_bytes());
    check_size(stored.scales, rows * scales_row_bytes());
  }

  int64_t row_bytes() const { return words_row_bytes() + scales_row_bytes(); }

  ReadFrom locate(int first_row, int rows) const {
    return words_file_.locate(words_offset(first_row), rows * words_row_bytes());
  }

  // Says which rows are read next, and from where: from the page cache, each piece is fetched while the one before it is
  // packed.
  void expect(int first_row, int rows, ReadFrom from) {
    window_ = FetchWindow();  // before the new one: both would be memory of the process
    if (from == ReadFrom::kCache) window_ = FetchWindow(words_file_, words_offset(first_row), rows * words_row_bytes());
  }

  PackedMatrix read(int first_row, int rows, ReadFrom from, HugeBuffer& words, HugeBuffer& scales) const {
    const uint8_t* w = read_rows(words_file_, stored_.words, words_row_bytes(), first_row, rows, from, words);
    const uint8_t* s = read_rows(scales_file_, stored_.scales, scales_row_bytes(), first_row, rows, from, scales);
    const uint8_t* next = window_.at(words_offset(first_row + rows));
    return {.words = reinterpret_cast<const uint32_t*>(w),
            .scales = reinterpret_cast<const uint16_t*>(s),
            .rows = rows,
            .inputs = inputs_,
            .first_row = first_row,
            .name = stored_.scales.name.c_str(),
            .file = stored_.scales.path.c_str(),
            .fetch = next ? reinterpret_cast<intptr_t>(next) - reinterpret_cast<intptr_t>(w) : kFetchAhead};
  }

 private:
  int64_t words_offset(int row) const { return stored_.words.offset + row * words_row_bytes(); }
  int64_t words_row_bytes() const { return inputs_ / 2; }
  int64_t scales_row_bytes() const { return inputs_ / kGroup * int64_t(sizeof(uint16_t)); }

  static void check_size(const StoredTensor& tensor, int64_t bytes) {
    check_argument(tensor.bytes == bytes, tensor.name.c_str(), text(bytes, " bytes"), tensor.bytes);
  }

  static const uint8_t* read_rows(const ShardFile& file, const StoredTensor& tensor, int64_t row_bytes, int first_row,
                                  int rows, ReadFrom from, HugeBuffer& staging) {
    try {
      return file.read(tensor.offset + first_row * row_bytes, rows * row_bytes, from, staging);
    } catch (const ReadError& error) {
      throw WeightError(text(tensor.name, ": ", error.what(), " (in ", tensor.path, ")"));
    }
  }

  const StoredMatrix& stored_;
  const ShardFile& words_file_;
  const ShardFile& scales_file_;
  const int inputs_;
  FetchWindow window_;
};

// `use(first row, rows, where to read them from)` for pieces of about `bytes`, in whole multiples of `multiple` rows.
template <class Use>
void for_pieces(int first, int last, int64_t row_bytes, int64_t bytes, int multiple, const Use& use) {
  const int rows = std::max(1, int(bytes / row_bytes / multiple)) * multiple;
  for (int row = first; row < last; row += rows) use(row, std::min(rows, last - row));
}

// The same for matrices of which the same rows are read together, `row_bytes` of one row of all of them, from where the
// first one's words lie.
template <class Use>
void for_located_pieces(std::initializer_list<MatrixReader*> matrices, int rows, int64_t row_bytes, int multiple,
                        const Use& use) {
  for_pieces(0, rows, row_bytes, kDiskPiece, multiple, [&](int first, int count) {
    const ReadFrom from = (*matrices.begin())->locate(first, count);
    for (MatrixReader* matrix : matrices) matrix->expect(first, count, from);
    const int64_t bytes = from == ReadFrom::kCache ? kCachePiece : kDiskPiece;
    for_pieces(first, first + count, row_bytes, bytes, multiple, [&](int row, int part) { use(row, part, from); });
  });
}

struct Staging {
  HugeBuffer words[2], scales[2];
};

}  // namespace

void read_expert(const StoredExpert& stored, ReadMode mode, ExpertLayer& layer, int expert) {
  thread_local Staging staging;  // mapping it again for each expert would cost as much as packing
  HugeBuffer* words = staging.words;
  HugeBuffer* scales = staging.scales;
  const LayerShape& shape = layer.shape();
  Files files(mode);
  MatrixReader gate(stored.gate, files, shape.intermediate, shape.hidden);
  MatrixReader up(stored.up, files, shape.intermediate, shape.hidden);
  MatrixReader down(stored.down, files, shape.hidden, shape.intermediate);
  layer.begin(expert);
  const int64_t both_bytes = gate.row_bytes() + up.row_bytes();
  for_located_pieces({&gate, &up}, shape.intermediate, both_bytes, kHalfBlock, [&](int row, int rows, ReadFrom from) {
    const PackedMatrix g = gate.read(row, rows, from, words[0], scales[0]);
    layer.pack_gate_up(expert, g, up.read(row, rows, from, words[1], scales[1]));
  });
  for_located_pieces({&down}, shape.hidden, down.row_bytes(), kRowBlock, [&](int row, int rows, ReadFrom from) {
    layer.pack_down(expert, down.read(row, rows, from, words[0], scales[0]));
  });
  layer.finish(expert);
}

}  // namespace k2
