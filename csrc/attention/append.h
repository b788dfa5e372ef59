// What comes before attention: new latents go into the cache, and queries are rotated.
#pragma once
#include <cstdint>
#include <vector>

#include "attention/latent_pages.h"
#include "kernels/attention.h"
#include "rows/rms_norm.h"

namespace k2 {

// The memory is the caller's and must outlive the call.
struct AppendInput {
  const float* latent;    // [tokens, latent_stride]: c | k_rope | padding, before norm and rotation
  int64_t latent_stride;  // at least kv_lora + rope
  int64_t tokens;
  NormWeight norm;        // of c
  const float *cos, *sin;  // [tokens, rope / 2]
  float* q;               // [tokens, heads, nope + rope]; the last columns of each head are rotated where they lie
  LatentPages pages;
  void* out;  // the memory of the pages
  std::vector<AttentionSequence> sequences;
};

class Append {
 public:
  // ArgumentError for rows or pages that do not exist.
  Append(const MlaSizes& sizes, AppendInput input);

  int64_t rows() const { return input_.tokens; }
  // Numbers read per row.
  int64_t width() const { return int64_t(sizes_.heads) * sizes_.rope + sizes_.latent; }

  // Rows first..last-1; different rows may be computed by different threads at once.
  void operator()(int64_t first, int64_t last) const;

 private:
  const MlaSizes sizes_;
  const AppendInput input_;
  std::vector<int64_t> slots_;  // [tokens] in the pages; of rows of no sequence -1
};

}  // namespace k2
