// Operations on rows at ragged sizes, in memory that ends where the rows end, against float64; and appending to pages,
// on several threads as on one: rows_test SEED
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/append.h"
#include "core/bf16.h"
#include "rows/activation.h"
#include "rows/rms_norm.h"
#include "rows/rotate.h"
#include "rows/route.h"
#include "rows/row_job.h"
#include "testing/attention_case.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;

std::vector<float> normal(Random& random, size_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> out(n);
  for (float& x : out) x = draw(random);
  return out;
}

bool near(double got, double expected, double tolerance) {
  return std::fabs(got - expected) <= tolerance * std::fabs(expected);
}

// Tolerances as in tests/unit/test_host_rows.py.
void numbers_equal_float64(Random& random, size_t n) {
  const std::vector<float> x = normal(random, n), y = normal(random, n);
  double squares = 0;
  for (const float v : x) squares += double(v) * v;
  std::vector<uint16_t> bits(n);
  round_to_bf16(y.data(), int64_t(n), bits.data());
  for (const bool bf16 : {false, true}) {
    std::vector<float> out(n);
    rms_norm(x.data(), int64_t(n), {bf16 ? static_cast<const void*>(bits.data()) : y.data(), bf16, 1e-5f}, out.data());
    for (size_t i = 0; i < n; ++i) {
      const double weight = bf16 ? std::bit_cast<float>(uint32_t(bits[i]) << 16) : y[i];
      K2_EXPECT(near(out[i], x[i] / std::sqrt(squares / double(n) + double(1e-5f)) * weight, 15 * 0x1p-24));
    }
  }
  std::vector<float> silu(n), score(n);
  silu_times(x.data(), y.data(), int64_t(n), silu.data());
  sigmoid(x.data(), int64_t(n), score.data());
  for (size_t i = 0; i < n; ++i) {
    const double sigma = 1 / (1 + std::exp(-double(x[i])));
    K2_EXPECT(near(silu[i], x[i] * sigma * y[i], 6 * 0x1p-24));
    K2_EXPECT(near(score[i], sigma, 6 * 0x1p-24));
  }
}

void choice_is_that_of_a_sort(Random& random, int experts) {
  const std::vector<float> logits = normal(random, size_t(experts));
  std::vector<float> bias = normal(random, size_t(experts)), scores(static_cast<size_t>(experts));
  for (float& b : bias) b = std::nearbyint(b);
  const int chosen = std::uniform_int_distribution<int>(1, experts)(random);
  std::vector<int32_t> ids(static_cast<size_t>(chosen)), order;
  std::vector<float> weights(static_cast<size_t>(chosen));
  route(logits.data(), {bias.data(), experts, chosen, false, 1}, scores.data(), ids.data(), weights.data());
  for (int e = 0; e < experts; ++e) order.push_back(e);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] + bias[a] > scores[b] + bias[b]; });
  for (int k = 0; k < chosen; ++k) K2_EXPECT(ids[k] == order[k] && weights[k] == scores[ids[k]]);
}

void appending_writes_the_places_of_the_rows(Random& random) {
  AttentionCase call(random);
  call.sizes = mla_sizes(call.sizes.heads, call.sizes.nope, 2 * (1 + call.sizes.rope / 2), 1, call.sizes.kv_lora);
  const MlaSizes& s = call.sizes;
  call.pages = normal(random, call.table.size() * size_t(call.page_tokens) * s.latent);
  call.pages_bf16 = false;
  const size_t tokens = size_t(call.tokens), stride = size_t(s.latent) + 3;
  const std::vector<float> latent = normal(random, tokens * stride), weight = normal(random, size_t(s.kv_lora));
  const std::vector<float> cos = normal(random, tokens * s.rope / 2), sin = normal(random, tokens * s.rope / 2);
  const std::vector<float> q = normal(random, tokens * s.heads * (s.nope + s.rope)), before = call.pages;
  auto append = [&](ThreadPool* pool, std::vector<float>& q_out) {
    std::vector<float> pages = before;
    q_out = q;
    const Append rows(s, {.latent = latent.data(),
                          .latent_stride = int64_t(stride),
                          .tokens = call.tokens,
                          .norm = {weight.data(), false, 1e-5f},
                          .cos = cos.data(),
                          .sin = sin.data(),
                          .q = q_out.data(),
                          .pages = call.latent_pages(),
                          .out = pages.data(),
                          .sequences = call.sequences});
    if (pool) {
      RowJob job(*pool, rows.rows(), rows);
      pool->submit(job);
      K2_EXPECT(pool->wait(job));
      job.rethrow();
    } else {
      rows(0, rows.rows());
    }
    return pages;
  };
  ThreadPool pool(3);
  std::vector<float> rotated, rotated_by_all;
  const std::vector<float> pages = append(nullptr, rotated);
  K2_EXPECT(append(&pool, rotated_by_all) == pages && rotated_by_all == rotated);
  std::vector<float> expected = before;
  for (const AttentionSequence& sequence : call.sequences) {
    for (int64_t i = 0; i < sequence.rows; ++i) {
      const size_t row = size_t(sequence.first_row + i), pairs = size_t(s.rope / 2);
      float* place = &expected[size_t(call.latent_pages().slot(sequence, sequence.cached + i) * s.latent)];
      rms_norm(&latent[row * stride], s.kv_lora, {weight.data(), false, 1e-5f}, place);
      for (size_t p = 0; p < pairs; ++p) {
        const float* from = &latent[row * stride + s.kv_lora + 2 * p];
        const float c = cos[row * pairs + p], d = sin[row * pairs + p];
        place[s.kv_lora + 2 * p] = from[0] * c - from[1] * d;
        place[s.kv_lora + 2 * p + 1] = from[0] * d + from[1] * c;
      }
    }
  }
  K2_EXPECT(pages == expected);
}

}  // namespace
}  // namespace k2

int main(int argc, char** argv) {
  K2_EXPECT(argc == 2);
  k2::Random random(std::stoull(argv[1]));
  for (const int n : {1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 384, 1000}) {
    k2::numbers_equal_float64(random, size_t(n));
    k2::choice_is_that_of_a_sort(random, n);
  }
  for (int i = 0; i < 20; ++i) k2::appending_writes_the_places_of_the_rows(random);
  std::puts("ok");
}
