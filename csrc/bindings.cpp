// The Python module: what the CPU offers, threads, errors. Other files add the rest, each for one kind of layer.
#include "bindings_rows.h"

#include <pybind11/stl.h>

#include <chrono>
#include <optional>
#include <tuple>

#include "core/error.h"
#include "cpu/affinity.h"
#include "cpu/features.h"
#include "kernels/kernel_list.h"
#include "runtime/peak_probe.h"
#include "runtime/read_probe.h"
#include "runtime/runtime.h"
#include "moe/tuning_probe.h"

namespace k2 {

std::string shape_text(const py::array& array) {
  std::string out = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) out += text(i ? ", " : "", array.shape(i));
  return out + "]";
}

bool finish(ThreadPool& pool, Job& job, Deadline deadline) {
  for (;;) {
    bool done = false;
    {
      const py::gil_scoped_release nogil;
      const Clock::time_point slice = Clock::now() + kSignalCheck;
      done = pool.wait(job, deadline ? std::min(*deadline, slice) : slice);
    }
    if (done) break;
    if (PyErr_CheckSignals() != 0) {
      job.cancel();
      {
        const py::gil_scoped_release nogil;
        pool.finish(job);
      }
      throw py::error_already_set();
    }
    if (deadline && Clock::now() >= *deadline) return false;
  }
  job.rethrow();
  return true;
}

void finish_without_gil(ThreadPool& pool, Job& job) {
  while (!pool.wait(job, Clock::now() + kSignalCheck)) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) continue;
    job.cancel();
    without_gil([&] { pool.finish(job); });
    throw py::error_already_set();
  }
  job.rethrow();
}

namespace {

constexpr int kMaxPrefetch = 1 << 16;  // bytes ahead
constexpr float kMaxTokenCost = 1000;

// (threads, number of the NUMA node or None, CPUs of each thread or none), as hybrid_k2.host.threads.NodeThreads.
using NodeTuple = std::tuple<int, std::optional<int>, std::vector<std::vector<int>>>;

// Without nodes all threads are on one, wherever the process may run.
PoolLayout pool_layout(int threads, const std::vector<NodeTuple>& nodes) {
  if (nodes.empty()) return {{threads, kAnyNode, {}}};
  PoolLayout layout;
  int sum = 0;
  for (const auto& [workers, node, cpus] : nodes) {
    layout.push_back({workers, node.value_or(kAnyNode), cpus});
    sum += workers;
  }
  check_argument(sum == threads, "nodes", text(threads, " threads in all"), sum);
  return layout;
}

// (streams, prefetch_one, prefetch_many, tiles_from, token_cost), as hybrid_k2.experts.tuning.Tuning.
using TuningTuple = std::tuple<int, int, int, int, float>;

TuningTuple tuning_tuple(const Tuning& tuning) {
  const CallPolicy& p = tuning.policy;
  return {p.streams, p.prefetch_one, p.prefetch_many, p.tiles_from, tuning.token_cost};
}

void tune(Runtime& runtime, const TuningTuple& tuple) {
  const auto& [streams, prefetch_one, prefetch_many, tiles_from, token_cost] = tuple;
  check_argument(streams == 1 || streams == 2 || streams == 4, "streams", "1, 2 or 4", streams);
  for (const auto& [name, bytes] : {std::pair{"prefetch_one", prefetch_one}, {"prefetch_many", prefetch_many}}) {
    check_argument(bytes >= 0 && bytes <= kMaxPrefetch, name, text("0..", kMaxPrefetch), bytes);
  }
  check_argument(tiles_from >= 1 && tiles_from <= kMaxTokens + 1, "tiles_from", text("1..", kMaxTokens + 1), tiles_from);
  check_argument(token_cost > 0 && token_cost <= kMaxTokenCost, "token_cost", text("above 0, at most ", kMaxTokenCost),
                 token_cost);
  runtime.tune({{streams, prefetch_one, prefetch_many, tiles_from}, token_cost});
}

py::list instruction_sets() {
  py::list out;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = Isa(i);
    py::list numerics;
    for (int n = 0; n < kNumericsCount; ++n) {
      if (kernel_table(isa, Numerics(n))) numerics.append(numerics_name(Numerics(n)));
    }
    out.append(py::make_tuple(isa_name(isa), numerics, feature_names(missing_features(isa))));
  }
  return out;
}

void translate(std::exception_ptr error) {
  auto raise = [](const char* name, const std::exception& e) {
    const py::object type = py::module_::import("hybrid_k2.errors").attr(name);
    PyErr_SetString(type.ptr(), e.what());
  };
  try {
    if (error) std::rethrow_exception(error);
  } catch (const ArgumentError& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const MemoryError& e) {
    PyErr_SetString(PyExc_MemoryError, e.what());
  } catch (const WeightError& e) {
    raise("CheckpointError", e);
  } catch (const EngineError& e) {
    raise("EngineError", e);
  }
}

}  // namespace

}  // namespace k2

PYBIND11_MODULE(_native, m) {
  using namespace k2;
  m.doc() = "INT4 experts on the CPU; see hybrid_k2/native.py, the only importer";
  py::register_local_exception_translator(translate);

  m.def("instruction_sets", &instruction_sets, "(name, numerics built, missing CPU features), best first");
  m.def("allowed_cpus", &allowed_cpus);
  m.def(
      "features_of",
      [](uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx, uint32_t leaf7_edx, uint32_t leaf7_1_eax,
         uint64_t xcr0) {
        return feature_names(features_of({leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0}));
      },
      py::arg("leaf1_ecx"), py::arg("leaf7_ebx"), py::arg("leaf7_ecx"), py::arg("leaf7_edx"), py::arg("leaf7_1_eax"),
      py::arg("xcr0"));

  py::class_<Runtime, std::shared_ptr<Runtime>>(m, "Runtime")
      .def(py::init([](const std::string& isa, int threads, const std::string& numerics,
                       const std::vector<NodeTuple>& nodes) {
             return std::make_shared<Runtime>(isa, find_numerics(numerics), pool_layout(threads, nodes));
           }),
           py::arg("isa"), py::arg("threads"), py::arg("numerics") = "exact",
           py::arg("nodes") = std::vector<NodeTuple>{})
      .def_property_readonly("isa", [](const Runtime& r) { return r.table.name; })
      .def_property_readonly("numerics", [](const Runtime& r) { return numerics_name(r.table.numerics); })
      .def_property_readonly("activations", [](const Runtime& r) { return r.table.activations; })
      .def_property_readonly("threads", [](const Runtime& r) { return r.pool.workers(); })
      .def_property_readonly("nodes", [](const Runtime& r) { return r.pool.map().nodes(); })
      .def_property_readonly("pinned_threads", [](const Runtime& r) { return r.pool.pinned(); })
      .def(
          "measure_read_gbps",
          [](Runtime& r, double seconds, size_t bytes) { return measure_read_gbps(r.pool, r.table, seconds, bytes); },
          py::arg("seconds"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>())
      .def(
          "measure_peak_gops",
          [](Runtime& r, double seconds) {
            return measure_peak_gops(r.pool, {r.table.peak, r.table.peak_operations}, seconds);
          },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def_property(
          "tuning", [](const Runtime& r) { return tuning_tuple(r.tuning()); }, &tune)
      .def(
          "measure_tuning",
          [](Runtime& r, double seconds, size_t bytes) {
            return tuning_tuple(measure_tuning(r.pool, r.table, seconds, bytes));
          },
          py::arg("seconds"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>())
      .def("close", [](Runtime& r) { r.pool.stop(); }, py::call_guard<py::gil_scoped_release>());

  bind_experts(m);
  bind_attention(m);
  bind_dense(m);
  bind_rows(m);
  bind_handoff(m);
  bind_step(m);
}
