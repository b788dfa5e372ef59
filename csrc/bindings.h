// What the files of the Python module share: arrays checked once, and a wait that Ctrl-C can end.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <memory>
#include <string>

#include "core/error.h"
#include "cpu/thread_pool.h"
#include "dense/dense_matrix.h"
#include "moe/layer.h"

namespace k2 {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::string shape_text(const py::array& array);

// A C-contiguous, aligned array of exactly this element type and shape. Texts are made for errors only: this is on the
// path of every decode step.
template <class T>
const T* array_data(const char* name, const py::array& array, std::initializer_list<int64_t> shape) {
  const bool fits = array.ndim() == py::ssize_t(shape.size()) && std::equal(shape.begin(), shape.end(), array.shape());
  if (!fits) {
    std::string expected;
    for (const int64_t size : shape) expected += text(expected.empty() ? "" : ", ", size);
    check_argument(false, name, text("shape [", expected, "]"), shape_text(array));
  }
  if (!py::isinstance<Array<T>>(array)) {
    check_argument(false, name, text("contiguous ", std::string(py::str(py::dtype::of<T>()))),
                   std::string(py::str(array.dtype())));
  }
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    check_argument(false, name, "an aligned array", "a misaligned one");
  }
  return static_cast<const T*>(array.data());
}

template <class T>
T* mutable_array_data(const char* name, const py::array& array, std::initializer_list<int64_t> shape) {
  array_data<T>(name, array, shape);
  if (!array.writeable()) check_argument(false, name, "a writable array", "a read-only one");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

template <class T>
const T* matrix(const char* name, const py::array& array, int64_t rows, int64_t columns) {
  return array_data<T>(name, array, {rows, columns});
}

template <class T>
T* mutable_matrix(const char* name, const py::array& array, int64_t rows, int64_t columns) {
  return mutable_array_data<T>(name, array, {rows, columns});
}

// How often a waiting call looks whether the user pressed Ctrl-C.
constexpr std::chrono::milliseconds kSignalCheck{50};

// Other threads of Python run meanwhile; `work` touches no Python object.
template <class Work>
void without_gil(Work work) {
  const py::gil_scoped_release nogil;
  work();
}

// Waits with the GIL released; false if the deadline passes first. After Ctrl-C the job is cancelled and the Python
// exception is thrown; else throws what the job threw.
bool finish(ThreadPool& pool, Job& job, Deadline deadline = std::nullopt);

// The same without a deadline, for a caller that has released the GIL.
void finish_without_gil(ThreadPool& pool, Job& job);

// hidden: float32, or bf16 as uint16, [T, H]; ids int32 and weights float32 [T, K].
MoeInput moe_input(const LayerShape& shape, const py::array& hidden, const py::array& ids, const py::array& weights);

// The layer behind its Python object. EngineError if it is closed.
std::shared_ptr<Layer> open_layer(const py::handle& layer);

// The matrix behind its Python object, of this runtime. EngineError if it is closed, ArgumentError for another runtime.
std::shared_ptr<DenseMatrix> open_dense(const py::handle& matrix, const Runtime& runtime);

void bind_experts(py::module_& m);
void bind_attention(py::module_& m);
void bind_dense(py::module_& m);
void bind_handoff(py::module_& m);
void bind_step(py::module_& m);

}  // namespace k2
