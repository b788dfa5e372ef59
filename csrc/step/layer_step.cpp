#include "step/layer_step.h"

#include <optional>
#include <utility>

#include "core/error.h"
#include "kernels/dense_list.h"
#include "rows/activation.h"
#include "rows/row_job.h"

namespace k2 {
namespace {

float* grow(std::vector<float>& numbers, int64_t count) {
  if (int64_t(numbers.size()) < count) numbers.resize(size_t(count));
  return numbers.data();
}

void check_matrix(const char* name, const DenseMatrix& matrix, int64_t rows, int64_t inputs) {
  if (matrix.rows() >= rows && matrix.inputs() == inputs) return;
  check_argument(false, name, text(rows, " rows of ", inputs, " inputs"),
                 text(matrix.rows(), " of ", matrix.inputs()));
}

// Keeps the workspace of attention for the next call, whatever happens in this one.
struct Borrowed {
  explicit Borrowed(LatentAttention& from) : owner(from), workspace(from.take_workspace()) {}
  ~Borrowed() { owner.give_workspace(std::move(workspace)); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  LatentAttention& owner;
  std::unique_ptr<AttentionWorkspace> workspace;
};

// As InFlight, of a job that the layer of the experts made.
struct ExpertsInFlight {
  ExpertsInFlight(ThreadPool& in, std::shared_ptr<MoeJob> started) : pool(in), job(std::move(started)) {}
  ~ExpertsInFlight() {
    if (!job->done()) job->cancel();
    pool.finish(*job);
  }
  ExpertsInFlight(const ExpertsInFlight&) = delete;
  ExpertsInFlight& operator=(const ExpertsInFlight&) = delete;

  ThreadPool& pool;
  std::shared_ptr<MoeJob> job;
};

}  // namespace

LayerStep::LayerStep(Runtime& runtime, LatentAttention& attention, const LayerParts& parts, StepMemory& memory,
                     const Wait& wait)
    : runtime_(runtime),
      attention_(attention),
      table_(find_dense_table(runtime.table.name)),
      parts_(parts),
      memory_(memory),
      wait_(wait),
      prefetch_one_(runtime.tuning().policy.prefetch_one) {
  const MlaSizes& s = attention_.sizes();
  const AttentionParts& a = parts_.attention;
  const int64_t width = hidden(), inner = parts_.mlp.gate->rows();
  check_matrix("kv_a", *a.kv_a, s.latent, width);
  check_matrix("q_b", *a.q_b, int64_t(s.heads) * (s.nope + s.rope), a.q_a->rows());
  check_matrix("o", *a.o, width, int64_t(s.heads) * s.value);
  check_matrix("gate", *parts_.mlp.gate, inner, width);
  check_matrix("up", *parts_.mlp.up, inner, width);
  check_matrix("down", *parts_.mlp.down, width, inner);
  if (!parts_.experts) return;
  const LayerShape& shape = parts_.experts->experts().shape();
  const RouterRule& rule = parts_.router.rule;
  check_matrix("router", *parts_.router.weight, rule.experts, width);
  if (shape.hidden == width && shape.experts == rule.experts && shape.experts_per_token == rule.chosen) return;
  check_argument(false, "experts", text(rule.chosen, " of ", rule.experts, " with ", width, " channels"),
                 text(shape.experts_per_token, " of ", shape.experts, " with ", shape.hidden));
}

void LayerStep::run(const StepInput& input) {
  runtime_.pool.check_process();
  attend(input);
  norm(input.x, input.rows, hidden(), parts_.post_norm, memory_.normal);
  if (parts_.experts) {
    experts(input);
  } else {
    dense(input);
  }
}

void LayerStep::attend(const StepInput& input) {
  const MlaSizes& s = attention_.sizes();
  const AttentionParts& a = parts_.attention;
  StepMemory& m = memory_;
  const int rows = input.rows, q_lora = a.q_a->rows();
  norm(input.x, rows, hidden(), parts_.input_norm, m.normal);
  multiply(m.normal, rows, {{a.q_a, &m.q_lora}, {a.kv_a, &m.latent}});
  norm(m.q_lora.data(), rows, q_lora, a.q_a_norm, m.q_lora);
  multiply(m.q_lora, rows, {{a.q_b, &m.q}});
  const Append append(s, {.latent = m.latent.data(),
                          .latent_stride = a.kv_a->rows(),
                          .tokens = rows,
                          .norm = a.kv_a_norm,
                          .cos = input.cos,
                          .sin = input.sin,
                          .q = m.q.data(),
                          .pages = input.pages,
                          .out = input.pages_out,
                          .sequences = input.sequences});
  for_rows(rows, append.width(), append);
  grow(m.values, int64_t(rows) * s.heads * s.value);
  {
    const Borrowed borrowed(attention_);
    InFlight<AttentionJob> job(attention_.pool(), attention_.table(), s, attention_.scale(),
                               AttentionInput{.q = m.q.data(),
                                              .tokens = rows,
                                              .kv_b = a.kv_b,
                                              .kv_b_bf16 = a.kv_b_bf16,
                                              .pages = input.pages,
                                              .sequences = input.sequences,
                                              .out = m.values.data()},
                               *borrowed.workspace);
    wait_(job.job());
  }
  multiply(m.values, rows, {{a.o, &m.out}});
  for (int64_t i = 0; i < int64_t(rows) * hidden(); ++i) input.x[i] += m.out[size_t(i)];
}

void LayerStep::dense(const StepInput& input) {
  StepMemory& m = memory_;
  multiply(m.normal, input.rows, {{parts_.mlp.gate, &m.gate}, {parts_.mlp.up, &m.up}});
  silu(input.rows);
  multiply(m.gate, input.rows, {{parts_.mlp.down, &m.out}});
  for (int64_t i = 0; i < int64_t(input.rows) * hidden(); ++i) input.x[i] += m.out[size_t(i)];
}

// The shared expert's last product waits behind the routed experts: nobody is idle in between.
void LayerStep::experts(const StepInput& input) {
  StepMemory& m = memory_;
  const MlpParts& shared = parts_.mlp;
  const RouterRule& rule = parts_.router.rule;
  const int rows = input.rows, columns = parts_.router.weight->rows();
  multiply(m.normal, rows, {{parts_.router.weight, &m.logits}, {shared.gate, &m.gate}, {shared.up, &m.up}});
  grow(m.weights, int64_t(rows) * rule.chosen);
  std::vector<float> scores(size_t(rule.experts));
  for (int64_t row = 0; row < rows; ++row) {
    route(m.logits.data() + row * columns, rule, scores.data(), input.ids + row * rule.chosen,
          m.weights.data() + row * rule.chosen);
  }
  const MoeInput routed{m.normal.data(), false, input.ids, m.weights.data(), rows};
  ExpertsInFlight job(runtime_.pool, parts_.experts->start(routed, grow(m.routed, int64_t(rows) * hidden())));
  silu(rows);
  InFlight<DenseJob> down(runtime_.pool, table_, products(rows, {{shared.down, &m.out}}),
                          DenseInput{m.gate.data(), rows}, m.packed, prefetch_one_);
  wait_(*job.job);
  wait_(down.job());
  for (int64_t i = 0; i < int64_t(rows) * hidden(); ++i) input.x[i] += m.routed[size_t(i)] + m.out[size_t(i)];
}

void LayerStep::multiply(const std::vector<float>& from, int rows, const Matrices& matrices) {
  Matrices int8, bf16;  // one job takes matrices of one kind
  for (const auto& pair : matrices) (pair.first->int8() ? int8 : bf16).push_back(pair);
  const DenseInput input{from.data(), rows};
  std::optional<InFlight<DenseJob>> first, second;
  if (!int8.empty()) {
    first.emplace(runtime_.pool, table_, products(rows, int8), input, memory_.packed, prefetch_one_);
  }
  if (!bf16.empty()) {
    second.emplace(runtime_.pool, table_, products(rows, bf16), input, memory_.more_packed, prefetch_one_);
  }
  if (first) wait_(first->job());
  if (second) wait_(second->job());
}

std::vector<DenseProduct> LayerStep::products(int rows, const Matrices& matrices) const {
  std::vector<DenseProduct> out;
  for (const auto& [matrix, numbers] : matrices) {
    out.push_back({matrix, grow(*numbers, int64_t(rows) * matrix->rows())});
  }
  return out;
}

void LayerStep::norm(const float* from, int rows, int columns, const NormWeight& weight, std::vector<float>& out) {
  float* to = grow(out, int64_t(rows) * columns);
  for_rows(rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t at = first * columns; at < last * columns; at += columns) {
      rms_norm(from + at, columns, weight, to + at);
    }
  });
}

void LayerStep::silu(int rows) {
  const int64_t inner = parts_.mlp.gate->rows();
  float* gate = memory_.gate.data();
  const float* up = memory_.up.data();
  for_rows(rows, inner, [&](int64_t first, int64_t last) {
    silu_times(gate + first * inner, up + first * inner, (last - first) * inner, gate + first * inner);
  });
}

template <class Work>
void LayerStep::for_rows(int64_t rows, int64_t width, const Work& work) {
  if (rows * width < kManyNumbers) return work(0, rows);
  InFlight<RowJob<Work>> job(runtime_.pool, rows, work);
  wait_(job.job());
}

}  // namespace k2
