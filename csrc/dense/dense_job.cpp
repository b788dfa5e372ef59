#include "dense/dense_job.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/share.h"
#include "kernels/dense_step.h"

namespace k2 {
namespace {

// Row blocks between two looks at whether the job was cancelled: well below a second, but for the portable kernels.
constexpr int kCheckBlocks = 128;

// Blocks that a worker takes at a time of those that belong to none: an eighth of a share, and above four whole streams of
// the kernels for one token.
int piece_of(int blocks, int workers) {
  const int piece = blocks / (8 * workers);
  return piece < kDenseStreams ? std::max(1, piece) : piece / kDenseStreams * kDenseStreams;
}

int blocks_on(int node, const DenseProduct& product) {
  const BlockRange range = product.matrix->range(node);
  return range.last - range.first;
}

}  // namespace

DenseJob::DenseJob(ThreadPool& pool, const DenseTable& table, std::vector<DenseProduct> products,
                   const DenseInput& input, std::vector<uint8_t>& scratch, int prefetch_one)
    : Job(pool),
      table_(table),
      products_(std::move(products)),
      input_(input),
      packed_(scratch),
      prefetch_one_(prefetch_one),
      taken_(new std::atomic<int>[size_t((input.tokens + kDenseTokens - 1) / kDenseTokens) * pool.map().nodes()]()) {
  if (!packs()) return;
  const size_t bytes = size_t(std::min(kDenseTokens, input.tokens)) * groups() * group_bytes();
  packed_.resize(std::max(packed_.size(), bytes));
  bad_.reset(new std::atomic<bool>[input.tokens]());
}

void DenseJob::run(Team& team, int worker) {
  const int node = team.node(worker), workers = team.node_workers(node);
  int blocks = 0, round = 0;
  for (const DenseProduct& product : products_) blocks += blocks_on(node, product);
  const Share share{team.rank(worker), workers};
  const int shared = blocks / 2, owned = blocks - shared, piece = piece_of(blocks, workers);
  for (int first = 0; first < input_.tokens; first += kDenseTokens) {
    const Chunk chunk{first, std::min(kDenseTokens, input_.tokens - first)};
    if (packs()) {
      if (first > 0) team.sync(++round);  // others may still read the packed rows of the chunk before
      pack(chunk, team, worker);
      team.sync(++round);
    }
    multiply(chunk, team, node, {share.begin(owned), share.end(owned)});
    std::atomic<int>& taken = taken_[size_t(first / kDenseTokens) * team.nodes() + node];
    for (int at; (at = taken.fetch_add(piece)) < shared;) {
      multiply(chunk, team, node, {owned + at, owned + std::min(at + piece, shared)});
    }
  }
}

void DenseJob::pack(const Chunk& chunk, const Team& team, int worker) {
  const Share share{worker, team.workers()};
  const int first = share.begin(groups()), last = share.end(groups());
  for (int t = 0; t < chunk.tokens; ++t) {
    const float* row = input_.rows + int64_t(chunk.first + t) * inputs() + first * kDenseGroup;
    const ptrdiff_t stride = ptrdiff_t(chunk.tokens) * group_bytes();
    uint8_t* packed = packed_.data() + first * stride + t * group_bytes();
    if (int8()) {
      if (!table_.pack(row, last - first, packed, stride)) bad_[chunk.first + t].store(true);
      continue;
    }
    for (int g = first; g < last; ++g, row += kDenseGroup, packed += stride) std::memcpy(packed, row, group_bytes());
  }
}

void DenseJob::multiply(const Chunk& chunk, const Team& team, int node, BlockRange part) {
  int before = 0;  // blocks of the node's part of the products so far
  for (const DenseProduct& product : products_) {
    const int start = product.matrix->range(node).first, count = blocks_on(node, product);
    multiply(chunk, product, team,
             {start + std::clamp(part.first - before, 0, count), start + std::clamp(part.last - before, 0, count)});
    before += count;
  }
}

void DenseJob::multiply(const Chunk& chunk, const DenseProduct& product, const Team& team, BlockRange part) {
  const DenseMatrix& matrix = *product.matrix;
  float* output = product.output + int64_t(chunk.first) * matrix.rows();
  for (int block = part.first; block < part.last; block += kCheckBlocks) {
    team.check_cancelled();
    (int8() ? table_.int8 : table_.bf16)({
        .weights = matrix.block(block),
        .groups = groups(),
        .blocks = std::min(kCheckBlocks, part.last - block),
        .tokens = chunk.tokens,
        .input = packs() ? packed_.data() : reinterpret_cast<const uint8_t*>(input_.rows),
        .output = output + block * kDenseRows,
        .output_stride = matrix.rows(),
        .prefetch_one = prefetch_one_,
    });
  }
  if (int8()) refuse(chunk, product, part);
}

// A row that has no packed form gives NaN.
void DenseJob::refuse(const Chunk& chunk, const DenseProduct& product, BlockRange part) {
  for (int token = chunk.first; token < chunk.first + chunk.tokens; ++token) {
    if (!bad_[token].load()) continue;
    float* row = product.output + int64_t(token) * product.matrix->rows();
    std::fill(row + part.first * kDenseRows, row + part.last * kDenseRows, std::numeric_limits<float>::quiet_NaN());
  }
}

void PackJob::run(Team& team, int worker) {
  const Share share{worker, team.workers()};
  const int first = share.begin(blocks_), last = share.end(blocks_);
  const int64_t at = int64_t(first) * kDenseRows * matrix_.inputs();
  const PlainRows mine{static_cast<const uint8_t*>(source_.values) + at * (source_.bf16 ? 2 : 4), source_.bf16};
  matrix_.pack(first_block_ + first, first_block_ + last, mine);
}

}  // namespace k2
