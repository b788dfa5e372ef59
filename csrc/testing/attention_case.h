// A random call of attention: ragged sizes, several sequences, pages in any order; and what it must give, in float64.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "attention/attention_job.h"
#include "testing/check.h"

namespace k2 {

class AttentionCase {
 public:
  using Random = std::mt19937_64;

  enum Kind {
    kAny,
    kLongContext,  // a decode step behind so many tokens that ranges of different sizes are used
    kPrompt,       // so many tokens and heads that one or two workers take several heads and groups at once, and more do not
  };

  explicit AttentionCase(Random& random, Kind kind = kAny) {
    const bool long_context = kind == kLongContext;
    auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    sizes = mla_sizes(pick(1, 40), pick(1, 40), pick(1, 20), pick(1, 20), pick(1, 70));
    if (long_context) sizes = mla_sizes(3, 5, 2, 4, 9);
    if (kind == kPrompt) sizes = mla_sizes(pick(29, 40), pick(1, 20), pick(1, 20), pick(1, 10), pick(1, 70));
    weights_bf16 = pick(0, 1), pages_bf16 = pick(0, 1);
    page_tokens = pick(1, 70);
    int64_t free_row = pick(0, 2);
    const int count = kind == kPrompt ? 1 : long_context ? 2 : pick(1, 4);
    for (int i = 0; i < count; ++i) {
      AttentionSequence s{free_row, pick(0, 2) ? 1 : pick(2, 12), long_context ? pick(6000, 15000) : pick(0, 250), 0};
      if (kind == kPrompt) s.rows = pick(33, 50), s.cached = pick(0, 60);
      s.first_page = int64_t(table.size()) + pick(0, 2);
      table.resize(size_t(s.first_page + (s.cached + s.rows + page_tokens - 1) / page_tokens));
      free_row = s.first_row + s.rows + pick(0, 1);
      sequences.push_back(s);
    }
    tokens = free_row;
    for (size_t i = 0; i < table.size(); ++i) table[i] = int64_t(i);
    std::shuffle(table.begin(), table.end(), random);
    std::normal_distribution<float> normal;
    scale = 1 / std::sqrt(float(sizes.nope + sizes.rope));
    fill(q, tokens * sizes.heads * (sizes.nope + sizes.rope), [&] { return 2 * normal(random); });
    fill(kv_b, int64_t(sizes.heads) * (sizes.nope + sizes.value) * sizes.kv_lora, [&] { return normal(random); });
    fill(pages, int64_t(table.size()) * page_tokens * sizes.latent, [&] { return normal(random); });
    narrow(kv_b, weights_bf16, kv_b_bits);
    narrow(pages, pages_bf16, pages_bits);
  }

  LatentPages latent_pages() const {
    return {.data = pages_bf16 ? static_cast<const void*>(pages_bits.data()) : pages.data(),
            .bf16 = pages_bf16,
            .count = int64_t(table.size()),
            .tokens = page_tokens,
            .table = table.data(),
            .table_size = int64_t(table.size())};
  }

  AttentionInput input(float* out) const {
    return {.q = q.data(),
            .tokens = tokens,
            .kv_b = weights_bf16 ? static_cast<const void*>(kv_b_bits.data()) : kv_b.data(),
            .kv_b_bf16 = weights_bf16,
            .pages = latent_pages(),
            .sequences = sequences,
            .out = out};
  }

  // [tokens, heads, value]; NaN where no sequence is.
  std::vector<float> run(const AttentionTable& attention, ThreadPool& pool, AttentionWorkspace& workspace) const {
    std::vector<float> out(size_t(tokens) * sizes.heads * sizes.value, std::numeric_limits<float>::quiet_NaN());
    AttentionJob job(pool, attention, sizes, scale, input(out.data()), workspace);
    pool.submit(job);
    K2_EXPECT(pool.wait(job));
    job.rethrow();
    return out;
  }

  std::vector<double> expected() const {
    std::vector<double> out(size_t(tokens) * sizes.heads * sizes.value, std::numeric_limits<double>::quiet_NaN());
    for (const AttentionSequence& s : sequences) {
      for (int64_t t = 0; t < s.rows; ++t) {
        for (int head = 0; head < sizes.heads; ++head) {
          const int64_t row = (s.first_row + t) * sizes.heads + head;
          attend(s, s.cached + t, head, &q[size_t(row * (sizes.nope + sizes.rope))], &out[size_t(row * sizes.value)]);
        }
      }
    }
    return out;
  }

  MlaSizes sizes;
  float scale;
  bool weights_bf16, pages_bf16;
  int64_t tokens, page_tokens;
  std::vector<int64_t> table;
  std::vector<AttentionSequence> sequences;
  std::vector<float> q, kv_b, pages;  // what the bits say, widened
  std::vector<uint16_t> kv_b_bits, pages_bits;

 private:
  template <class Draw>
  static void fill(std::vector<float>& out, int64_t count, Draw draw) {
    for (int64_t i = 0; i < count; ++i) out.push_back(draw());
  }

  static void narrow(std::vector<float>& wide, bool bf16, std::vector<uint16_t>& bits) {
    if (!bf16) return;
    for (float& x : wide) {
      bits.push_back(uint16_t(std::bit_cast<uint32_t>(x) >> 16));
      x = std::bit_cast<float>(uint32_t(bits.back()) << 16);
    }
  }

  const float* latent(const AttentionSequence& s, int64_t key) const {
    const int64_t page = table[size_t(s.first_page + key / page_tokens)];
    return &pages[size_t((page * page_tokens + key % page_tokens) * sizes.latent)];
  }

  // Keys and values of each token, and an ordinary softmax: not the form that the kernels use.
  void attend(const AttentionSequence& s, int64_t position, int head, const float* query, double* out) const {
    const float* w = &kv_b[size_t(head) * (sizes.nope + sizes.value) * sizes.kv_lora];
    std::vector<double> scores;
    double highest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t key = 0; key <= position; ++key) {
      const float* c = latent(s, key);
      double score = 0;
      for (int n = 0; n < sizes.nope; ++n) score += query[n] * dot(w + int64_t(n) * sizes.kv_lora, c);
      for (int r = 0; r < sizes.rope; ++r) score += double(query[sizes.nope + r]) * c[sizes.kv_lora + r];
      scores.push_back(score * scale);
      highest = std::max(highest, scores.back());
    }
    for (double& score : scores) total += score = std::exp(score - highest);
    for (int v = 0; v < sizes.value; ++v) {
      const float* w_uv = w + int64_t(sizes.nope + v) * sizes.kv_lora;
      double sum = 0;
      for (int64_t key = 0; key <= position; ++key) sum += scores[size_t(key)] * dot(w_uv, latent(s, key));
      out[v] = sum / total;
    }
  }

  double dot(const float* w, const float* c) const {
    double sum = 0;
    for (int i = 0; i < sizes.kv_lora; ++i) sum += double(w[i]) * c[i];
    return sum;
  }
};

}  // namespace k2
