// Whole layers for Python; see hybrid_k2/model/host_layer.py.
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_attention.h"
#include "bindings_rows.h"
#include "step/layer_step.h"

namespace k2 {
namespace {

// Scratch memory that the layers of a model share, one after the other. Changed under the GIL: a step takes it, and one
// that begins meanwhile, in a signal handler, makes its own.
struct PyStepMemory {
  std::unique_ptr<StepMemory> spare = std::make_unique<StepMemory>();
};

class Taken {
 public:
  explicit Taken(PyStepMemory& from)
      : from_(from), memory_(from.spare ? std::move(from.spare) : std::make_unique<StepMemory>()) {}
  ~Taken() { from_.spare = std::move(memory_); }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

  StepMemory& operator*() { return *memory_; }

 private:
  PyStepMemory& from_;
  std::unique_ptr<StepMemory> memory_;
};

// Holds the Python objects of its parts; they can be closed, which the next step finds.
class PyHostLayer {
 public:
  using Norm = std::pair<py::array, float>;                // weight, epsilon
  using Router = std::tuple<py::array, int, bool, float>;  // bias [E], experts per token, normalise, scale

  PyHostLayer(py::object attention, py::object memory, std::map<std::string, Norm> norms,
              std::map<std::string, py::object> matrices, py::array kv_b, std::optional<Router> router,
              py::object experts)
      : attention_(std::move(attention)),
        memory_(std::move(memory)),
        norms_(std::move(norms)),
        matrices_(std::move(matrices)),
        kv_b_(std::move(kv_b)),
        router_(std::move(router)),
        experts_(std::move(experts)) {
    Open open(*this);  // what does not fit is refused at once
    StepMemory none;
    LayerStep(open.attention.runtime(), open.attention, open.parts, none, {});
  }

  // x float32 [T, hidden], changed where it lies; cos, sin float32 [T, rope / 2]; the rest as for `attend`. Returns the
  // numbers of the chosen experts, int32 [T, K], or None without experts.
  py::object run(const py::array& x, const py::array& cos, const py::array& sin, const py::array& pages,
                 const py::array& page_table, const py::array& sequences) {
    Open open(*this);
    LatentAttention& attention = open.attention;
    const int64_t rows = x.ndim() == 2 ? x.shape(0) : 0, pairs = attention.sizes().rope / 2;
    check_argument(rows <= kMaxRows, "x", text("at most ", kMaxRows, " rows"), rows);
    if (!pages.writeable()) check_argument(false, "pages", "a writable array", "a read-only one");
    const LatentPages where = latent_pages(attention.sizes(), pages, page_table);
    py::object ids = py::none();
    int32_t* numbers = nullptr;
    if (open.layer) {
      Array<int32_t> array({rows, int64_t(open.parts.router.rule.chosen)});
      numbers = array.mutable_data();
      ids = std::move(array);
    }
    const StepInput input{.x = mutable_matrix<float>("x", x, rows, open.parts.attention.q_a->inputs()),
                          .rows = int(rows),
                          .cos = matrix<float>("cos", cos, rows, pairs),
                          .sin = matrix<float>("sin", sin, rows, pairs),
                          .pages = where,
                          .pages_out = const_cast<void*>(where.data),
                          .sequences = read_sequences(sequences),
                          .ids = numbers};
    Taken memory(memory_.cast<PyStepMemory&>());
    without_gil([&] {
      const Wait wait = [&](Job& job) { finish_without_gil(attention.pool(), job); };
      LayerStep(attention.runtime(), attention, open.parts, *memory, wait).run(input);
    });
    return ids;
  }

 private:
  static constexpr int64_t kMaxRows = 1 << 12;

  // The parts, kept open.
  struct Open {
    explicit Open(const PyHostLayer& from) : attention(from.attention_.cast<LatentAttention&>()) {
      const MlaSizes& s = attention.sizes();
      auto matrix = [&](const char* name) {
        kept.push_back(open_dense(from.matrices_.at(name), attention.runtime()));
        return kept.back().get();
      };
      auto norm = [&](const char* name, int64_t columns) {
        const auto& [weight, eps] = from.norms_.at(name);
        return norm_weight(weight, columns, eps);
      };
      AttentionParts& a = parts.attention;
      a.q_a = matrix("q_a"), a.kv_a = matrix("kv_a"), a.q_b = matrix("q_b"), a.o = matrix("o");
      a.kv_b_bf16 = is_bf16(from.kv_b_);
      a.q_a_norm = norm("q_a_norm", a.q_a->rows());
      a.kv_a_norm = norm("kv_a_norm", s.kv_lora);
      a.kv_b = numbers("kv_b", from.kv_b_, a.kv_b_bf16, {int64_t(s.heads) * (s.nope + s.value), s.kv_lora});
      parts.input_norm = norm("input_norm", a.q_a->inputs());
      parts.post_norm = norm("post_norm", a.q_a->inputs());
      parts.mlp = {matrix("gate"), matrix("up"), matrix("down")};
      parts.experts = nullptr;
      if (!from.router_) return;
      const auto& [bias, chosen, normalise, scale] = *from.router_;
      const int64_t experts = bias.ndim() == 1 ? bias.shape(0) : 0;
      check_argument(chosen >= 1 && chosen <= experts, "experts per token", text("1..", experts), chosen);
      const float* biases = array_data<float>("bias", bias, {experts});
      parts.router = {matrix("router"), {biases, int(experts), chosen, normalise, scale}};
      layer = open_layer(from.experts_);
      check_argument(&layer->runtime() == &attention.runtime(), "experts", "one runtime", "several");
      parts.experts = layer.get();
    }

    LatentAttention& attention;
    std::vector<std::shared_ptr<DenseMatrix>> kept;
    std::shared_ptr<Layer> layer;
    LayerParts parts{};
  };

  const py::object attention_, memory_;
  const std::map<std::string, Norm> norms_;
  const std::map<std::string, py::object> matrices_;
  const py::array kv_b_;
  const std::optional<Router> router_;
  const py::object experts_;
};

}  // namespace

void bind_step(py::module_& m) {
  py::class_<PyStepMemory>(m, "StepMemory").def(py::init<>());
  py::class_<PyHostLayer>(m, "HostLayer")
      .def(py::init<py::object, py::object, std::map<std::string, PyHostLayer::Norm>, std::map<std::string, py::object>,
                    py::array, std::optional<PyHostLayer::Router>, py::object>(),
           py::arg("attention"), py::arg("memory"), py::arg("norms"), py::arg("matrices"), py::arg("kv_b"),
           py::arg("router"), py::arg("experts"))
      .def("run", &PyHostLayer::run, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("pages"),
           py::arg("page_table"), py::arg("sequences"));
}

}  // namespace k2
