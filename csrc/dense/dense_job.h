// Products of one batch of rows with dense matrices on all workers of the pool.
//
// Of the row blocks in a node's memory its workers own half, a contiguous range each; the other half they take in pieces
// as they get done, so that one who is slower, for a neighbour on its core or another program, does not keep the others
// waiting. A row block is columns of the outputs: nothing is reduced, so results do not depend on the number of workers or
// nodes, nor on who computed what. Batches run in chunks of tokens, so that a chunk's rows stay in the caches while every
// row block meets them. The workers first bring a chunk's rows into the order that the kernels read, each some groups; one
// row in fp32 has it.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/thread_pool.h"
#include "dense/dense_matrix.h"
#include "kernels/dense_table.h"

namespace k2 {

// Rows [tokens, inputs] in fp32; the memory is the caller's and must stay until the job has ended.
struct DenseInput {
  const float* rows;
  int tokens;
};

// One product: output [tokens, matrix.rows] = rows . matrix^T.
struct DenseProduct {
  const DenseMatrix* matrix;
  float* output;
};

// Several matrices, of equal inputs and all bf16 or all int8, over the same rows.
class DenseJob final : public Job {
 public:
  // `scratch` keeps the packed rows; it may be used for the next job when this one has ended. `prefetch_one` as
  // DenseTask's: what this machine likes is what the expert kernels were tuned to, which read like these.
  DenseJob(ThreadPool& pool, const DenseTable& table, std::vector<DenseProduct> products, const DenseInput& input,
           std::vector<uint8_t>& scratch, int prefetch_one = 0);

 private:
  struct Chunk {
    int first, tokens;
  };

  void run(Team& team, int worker) override;
  void pack(const Chunk& chunk, const Team& team, int worker);
  // `part` of the node's row blocks of all products, one after the other; of one product's matrix.
  void multiply(const Chunk& chunk, const Team& team, int node, BlockRange part);
  void multiply(const Chunk& chunk, const DenseProduct& product, const Team& team, BlockRange part);
  void refuse(const Chunk& chunk, const DenseProduct& product, BlockRange part);

  int inputs() const { return products_.front().matrix->inputs(); }
  int groups() const { return products_.front().matrix->groups(); }
  bool int8() const { return products_.front().matrix->int8(); }
  bool packs() const { return int8() || input_.tokens > 1; }
  int group_bytes() const { return int8() ? table_.group_bytes : kDenseGroup * int(sizeof(float)); }

  const DenseTable& table_;
  const std::vector<DenseProduct> products_;
  const DenseInput input_;
  std::vector<uint8_t>& packed_;  // [groups, tokens of the chunk, group_bytes]
  const int prefetch_one_;
  const std::unique_ptr<std::atomic<int>[]> taken_;  // [chunks, nodes] of the row blocks that no worker owns
  std::unique_ptr<std::atomic<bool>[]> bad_;         // [tokens] the row has no packed form
};

// Packs plain rows into consecutive row blocks of a matrix, from `first_block` on.
class PackJob final : public Job {
 public:
  PackJob(ThreadPool& pool, DenseMatrix& matrix, const PlainRows& source, int first_block, int blocks)
      : Job(pool), matrix_(matrix), source_(source), first_block_(first_block), blocks_(blocks) {}

 private:
  void run(Team& team, int worker) override;

  DenseMatrix& matrix_;
  const PlainRows source_;
  const int first_block_, blocks_;
};

}  // namespace k2
