// One layer of the model over a few rows, with all of its weights on the host: the same functions and jobs as when the
// interpreter calls them one by one, with the same bits, without going back to it in between.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "attention/append.h"
#include "attention/latent_attention.h"
#include "dense/dense_job.h"
#include "moe/layer.h"
#include "rows/rms_norm.h"
#include "rows/route.h"
#include "step/in_flight.h"

namespace k2 {

struct AttentionParts {
  const DenseMatrix *q_a, *kv_a, *q_b, *o;
  NormWeight q_a_norm, kv_a_norm;
  const void* kv_b;  // [heads, nope + value, kv_lora]
  bool kv_b_bf16;    // else fp32
};

struct MlpParts {
  const DenseMatrix *gate, *up, *down;
};

struct RouterParts {
  const DenseMatrix* weight;  // [experts and padding, hidden]
  RouterRule rule;
};

struct LayerParts {
  NormWeight input_norm, post_norm;
  AttentionParts attention;
  MlpParts mlp;         // of a layer with experts the shared one
  RouterParts router;   // of a layer with experts
  Layer* experts;       // null in a dense layer
};

// The memory is the caller's and must outlive the step.
struct StepInput {
  float* x;  // [rows, hidden], the residual stream, which is changed where it lies
  int rows;
  const float *cos, *sin;  // [rows, rope / 2]
  LatentPages pages;
  void* pages_out;  // the memory of the pages
  std::vector<AttentionSequence> sequences;
  int32_t* ids;  // [rows, experts per token], is filled in a layer with experts
};

// Scratch memory, kept from step to step.
struct StepMemory {
  std::vector<float> normal, q_lora, latent, q, values, out, gate, up, logits, weights, routed;
  std::vector<uint8_t> packed, more_packed;
};

class LayerStep {
 public:
  // ArgumentError unless the parts' sizes fit each other.
  LayerStep(Runtime& runtime, LatentAttention& attention, const LayerParts& parts, StepMemory& memory,
            const Wait& wait);

  // ArgumentError as AttentionJob, EngineError as MoeJob.
  void run(const StepInput& input);

 private:
  using Matrices = std::vector<std::pair<const DenseMatrix*, std::vector<float>*>>;

  void attend(const StepInput& input);
  void dense(const StepInput& input);
  void experts(const StepInput& input);

  // Products of the rows `from` with matrices of equal inputs, into memory that is made large enough.
  void multiply(const std::vector<float>& from, int rows, const Matrices& matrices);
  std::vector<DenseProduct> products(int rows, const Matrices& matrices) const;
  void norm(const float* from, int rows, int columns, const NormWeight& weight, std::vector<float>& out);
  void silu(int rows);
  template <class Work>
  void for_rows(int64_t rows, int64_t width, const Work& work);

  int hidden() const { return parts_.attention.q_a->inputs(); }

  Runtime& runtime_;
  LatentAttention& attention_;
  const DenseTable& table_;
  const LayerParts& parts_;
  StepMemory& memory_;
  const Wait& wait_;
  const int prefetch_one_;
};

}  // namespace k2
