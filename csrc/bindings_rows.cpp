// Operations on rows for Python; see hybrid_k2/model/host_rows.py.
#include "bindings_rows.h"

#include <vector>

#include "rows/activation.h"
#include "rows/route.h"
#include "runtime/runtime.h"

namespace k2 {
namespace {

int64_t side(const py::array& array, int axis) { return array.ndim() == 2 ? array.shape(axis) : 0; }

// x, out float32 [T, n]; weight [n] float32 or bf16 as uint16.
void norm_rows(Runtime& runtime, const py::array& x, const py::array& weight, float eps, const py::array& out) {
  const int64_t rows = side(x, 0), columns = side(x, 1);
  const float* from = matrix<float>("x", x, rows, columns);
  float* to = mutable_matrix<float>("out", out, rows, columns);
  const NormWeight norm = norm_weight(weight, columns, eps);
  for_rows(&runtime.pool, rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t at = first * columns; at < last * columns; at += columns) rms_norm(from + at, columns, norm, to + at);
  });
}

// gate, up, out float32 [T, n].
void silu_rows(Runtime& runtime, const py::array& gate, const py::array& up, const py::array& out) {
  const int64_t rows = side(gate, 0), columns = side(gate, 1);
  const float *from = matrix<float>("gate", gate, rows, columns), *factor = matrix<float>("up", up, rows, columns);
  float* to = mutable_matrix<float>("out", out, rows, columns);
  for_rows(&runtime.pool, rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t at = first * columns; at < last * columns; at += columns) {
      silu_times(from + at, factor + at, columns, to + at);
    }
  });
}

// logits float32 [T, E or more]; bias float32 [E]; ids int32 and weights float32 [T, K].
void route_rows(Runtime& runtime, const py::array& logits, const py::array& bias, bool normalise, float scale,
                const py::array& ids, const py::array& weights) {
  const int64_t rows = side(logits, 0), columns = side(logits, 1), chosen = side(ids, 1);
  const int64_t experts = bias.ndim() == 1 ? bias.shape(0) : 0;
  check_argument(experts <= columns, "logits", text("at least ", experts, " columns"), columns);
  check_argument(chosen >= 1 && chosen <= experts, "ids", text("1..", experts, " columns"), chosen);
  const float* from = matrix<float>("logits", logits, rows, columns);
  int32_t* numbers = mutable_matrix<int32_t>("ids", ids, rows, chosen);
  float* factors = mutable_matrix<float>("weights", weights, rows, chosen);
  const RouterRule rule{array_data<float>("bias", bias, {experts}), int(experts), int(chosen), normalise, scale};
  for_rows(&runtime.pool, rows, columns, [&](int64_t first, int64_t last) {
    std::vector<float> scores(size_t(rule.experts));
    for (int64_t row = first; row < last; ++row) {
      route(from + row * columns, rule, scores.data(), numbers + row * chosen, factors + row * chosen);
    }
  });
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def("rms_norm", &norm_rows, py::arg("runtime"), py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
  m.def("silu_times", &silu_rows, py::arg("runtime"), py::arg("gate"), py::arg("up"), py::arg("out"));
  m.def("route", &route_rows, py::arg("runtime"), py::arg("logits"), py::arg("bias"), py::arg("normalise"),
        py::arg("scale"), py::arg("ids"), py::arg("weights"));
}

}  // namespace k2
