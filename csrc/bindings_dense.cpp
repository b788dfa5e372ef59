// Dense matrices for Python.
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/first_touch.h"
#include "dense/dense_job.h"
#include "kernels/dense_list.h"
#include "runtime/peak_probe.h"
#include "runtime/runtime.h"

namespace k2 {
namespace {

constexpr int64_t kMaxRows = 1 << 20;  // of one call

// Memory of one call, kept by its thread for the next one. A signal handler that multiplies while its thread is inside a
// call finds none and gets its own.
struct Scratch {
  Scratch() : bytes(std::exchange(kept(), {})) {}
  ~Scratch() { kept() = std::move(bytes); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static std::vector<uint8_t>& kept() {
    thread_local std::vector<uint8_t> bytes;
    return bytes;
  }

  std::vector<uint8_t> bytes;
};

int prefetch_one(const Runtime& runtime) { return runtime.tuning().policy.prefetch_one; }

// A matrix that Python can close while other threads are inside a call: each call holds what it uses.
class PyDense {
 public:
  PyDense(std::shared_ptr<Runtime> runtime, int rows, int inputs, bool int8)
      : runtime_(std::move(runtime)),
        table_(find_dense_table(runtime_->table.name)),
        matrix_(std::make_shared<DenseMatrix>(rows, inputs, int8, runtime_->pool.map(), runtime_->memory_nodes)) {
    first_touch(runtime_->pool, matrix_->buffers());
  }

  const std::shared_ptr<DenseMatrix>& open() const {
    if (!matrix_) throw EngineError("dense matrix: expected an open one, got a closed one");
    return matrix_;
  }
  Runtime& runtime() const { return *runtime_; }
  const DenseTable& table() const { return table_; }

  // bf16 as uint16, or float32, [n, inputs]: the rows from `first_row` on, whole row blocks.
  void load_rows(int first_row, const py::array& values) {
    const std::shared_ptr<DenseMatrix> m = open();
    const int64_t count = values.ndim() == 2 ? values.shape(0) : 0;
    check_argument(first_row % kDenseRows == 0 && count % kDenseRows == 0, "rows", "a multiple of 32",
                   text(count, " from ", first_row));
    check_argument(first_row >= 0 && first_row + count <= m->rows(), "rows", text("at most ", m->rows()),
                   first_row + count);
    const bool bf16 = py::isinstance<Array<uint16_t>>(values);
    const void* source = bf16 ? static_cast<const void*>(matrix<uint16_t>("values", values, count, m->inputs()))
                              : matrix<float>("values", values, count, m->inputs());
    run(PackJob(runtime_->pool, *m, {source, bf16}, first_row / kDenseRows, int(count) / kDenseRows));
  }

  // bf16: uint16 [rows, inputs]; int8: (int8 [rows, inputs], scales as uint16 [rows, inputs / 32]).
  py::object read() const {
    const std::shared_ptr<DenseMatrix> m = open();
    if (!m->int8()) {
      Array<uint16_t> out({m->rows(), m->inputs()});
      uint16_t* data = out.mutable_data();
      without_gil([&] { m->unpack_bf16(data); });
      return out;
    }
    Array<int8_t> values({m->rows(), m->inputs()});
    Array<uint16_t> scales({m->rows(), m->groups()});
    const Int8Rows rows{values.mutable_data(), scales.mutable_data()};
    without_gil([&] { m->unpack_int8(rows); });
    return py::make_tuple(values, scales);
  }

  // x float32 [T, inputs], output float32 [T, rows].
  void multiply(const py::array& x, const py::array& output) {
    const std::shared_ptr<DenseMatrix> m = open();
    const DenseInput in = input(x, m->inputs());
    float* out = mutable_matrix<float>("output", output, in.tokens, m->rows());
    Scratch scratch;
    run(DenseJob(runtime_->pool, table_, {{m.get(), out}}, in, scratch.bytes, prefetch_one(*runtime_)));
  }

  static DenseInput input(const py::array& x, int inputs) {
    const int64_t tokens = x.ndim() == 2 ? x.shape(0) : 0;
    if (tokens > kMaxRows) check_argument(false, "x", text("at most ", kMaxRows, " rows"), tokens);
    return {matrix<float>("x", x, tokens, inputs), int(tokens)};
  }

  template <class AnyJob>
  void run(AnyJob&& job) const {
    {
      const py::gil_scoped_release nogil;
      runtime_->pool.submit(job);
    }
    finish(runtime_->pool, job, std::nullopt);
  }

  void close() { matrix_.reset(); }

 private:
  std::shared_ptr<Runtime> runtime_;
  const DenseTable& table_;
  std::shared_ptr<DenseMatrix> matrix_;
};

// Several matrices of one runtime and of equal inputs over the same rows.
void multiply_all(const std::vector<PyDense*>& matrices, const py::array& x, const std::vector<py::array>& outputs) {
  check_argument(!matrices.empty() && matrices.size() == outputs.size(), "outputs", "one for each matrix",
                 outputs.size());
  std::vector<std::shared_ptr<DenseMatrix>> open;
  std::vector<DenseProduct> products;
  const DenseInput in = PyDense::input(x, matrices.front()->open()->inputs());
  for (size_t i = 0; i < matrices.size(); ++i) {
    open.push_back(matrices[i]->open());
    check_argument(&matrices[i]->runtime() == &matrices.front()->runtime(), "matrices", "one runtime", "several");
    check_argument(open.back()->inputs() == open.front()->inputs(), "matrices", "equal inputs", open.back()->inputs());
    check_argument(open.back()->int8() == open.front()->int8(), "matrices", "one dtype", "several");
    products.push_back({open.back().get(), mutable_matrix<float>("output", outputs[i], in.tokens, open.back()->rows())});
  }
  const PyDense& first = *matrices.front();
  Scratch scratch;
  first.run(DenseJob(first.runtime().pool, first.table(), std::move(products), in, scratch.bytes,
                     prefetch_one(first.runtime())));
}

double measure_dense_peak(Runtime& runtime, bool int8, double seconds) {
  const DenseTable& table = find_dense_table(runtime.table.name);
  const DensePeak& peak = int8 ? table.int8_peak : table.bf16_peak;
  return measure_peak_gops(runtime.pool, {peak.run, peak.operations}, seconds);
}

}  // namespace

std::shared_ptr<DenseMatrix> open_dense(const py::handle& matrix, const Runtime& runtime) {
  const PyDense& dense = matrix.cast<const PyDense&>();
  check_argument(&dense.runtime() == &runtime, "matrices", "one runtime", "several");
  return dense.open();
}

void bind_dense(py::module_& m) {
  py::class_<PyDense>(m, "DenseMatrix")
      .def(py::init<std::shared_ptr<Runtime>, int, int, bool>(), py::arg("runtime"), py::arg("rows"), py::arg("inputs"),
           py::arg("int8"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bound", [](const PyDense& d) { return d.open()->bound(); })
      .def_property_readonly("nbytes", [](const PyDense& d) { return d.open()->bytes(); })
      .def("load_rows", &PyDense::load_rows, py::arg("first_row"), py::arg("values"))
      .def("read", &PyDense::read)
      .def("multiply", &PyDense::multiply, py::arg("x"), py::arg("output"))
      .def("close", &PyDense::close);
  m.def("measure_dense_peak_gops", &measure_dense_peak, py::arg("runtime"), py::arg("int8"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>());
  m.def("multiply_all", &multiply_all, py::arg("matrices"), py::arg("x"), py::arg("outputs"));
}

}  // namespace k2
