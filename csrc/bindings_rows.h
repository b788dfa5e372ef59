// What the bindings of operations on rows share.
#pragma once
#include "bindings.h"
#include "rows/rms_norm.h"
#include "rows/row_job.h"

namespace k2 {

inline bool is_bf16(const py::array& array) { return py::isinstance<Array<uint16_t>>(array); }

// bf16 as uint16, or float32.
inline const void* numbers(const char* name, const py::array& array, bool bf16, std::initializer_list<int64_t> shape) {
  if (bf16) return array_data<uint16_t>(name, array, shape);
  return array_data<float>(name, array, shape);
}

inline NormWeight norm_weight(const py::array& array, int64_t columns, float eps) {
  const bool bf16 = is_bf16(array);
  return {numbers("weight", array, bf16, {columns}), bf16, eps};
}

// Calls work(first, last) for all rows: on this thread, or on all of the pool where there are many. Few rows take less
// time than to get the interpreter back after letting it go.
template <class Work>
void for_rows(ThreadPool* pool, int64_t rows, int64_t width, const Work& work) {
  if (rows * width < kManyNumbers) return work(0, rows);
  if (!pool) return without_gil([&] { work(0, rows); });
  RowJob job(*pool, rows, work);
  without_gil([&] { pool->submit(job); });
  finish(*pool, job);
}

void bind_rows(py::module_& m);

}  // namespace k2
