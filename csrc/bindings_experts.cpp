// The experts of a layer for Python. Arrays are checked against the layer's sizes here, once.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "core/error.h"
#include "io/expert_reader.h"
#include "moe/l32_digest.h"
#include "moe/layer.h"

namespace k2 {
namespace {

constexpr int64_t kMaxBatch = 1 << 20;  // tokens of one call

}  // namespace

MoeInput moe_input(const LayerShape& shape, const py::array& hidden, const py::array& ids, const py::array& weights) {
  check_argument(hidden.ndim() == 2, "hidden", text("shape [T, ", shape.hidden, "]"), shape_text(hidden));
  const int64_t tokens = hidden.shape(0);
  check_argument(tokens <= kMaxBatch, "hidden", text("at most ", kMaxBatch, " tokens"), tokens);
  const bool bf16 = py::isinstance<Array<uint16_t>>(hidden);
  const void* rows = bf16 ? static_cast<const void*>(matrix<uint16_t>("hidden", hidden, tokens, shape.hidden))
                          : matrix<float>("hidden", hidden, tokens, shape.hidden);
  return {rows, bf16, matrix<int32_t>("ids", ids, tokens, shape.experts_per_token),
          matrix<float>("weights", weights, tokens, shape.experts_per_token), int(tokens)};
}

namespace {

// int32 words [rows, inputs / 8] and bf16 scales as uint16 [rows, inputs / 32].
PackedMatrix packed_matrix(const char* name, const py::array& words, const py::array& scales, int rows, int inputs) {
  return {.words = reinterpret_cast<const uint32_t*>(matrix<int32_t>(name, words, rows, inputs / 8)),
          .scales = matrix<uint16_t>(name, scales, rows, inputs / kGroup),
          .rows = rows,
          .inputs = inputs,
          .name = name};
}

// The blocks of an expert in layout L32: w13 [I/16, H/32, 576] and w2 [H/32, I/32, 576].
std::pair<const uint8_t*, const uint8_t*> l32(const LayerShape& s, const py::array& w13, const py::array& w2) {
  return {array_data<uint8_t>("w13", w13, {s.intermediate / kHalfBlock, s.hidden_groups(), kBlockBytes}),
          array_data<uint8_t>("w2", w2, {s.hidden_groups(), s.intermediate_groups(), kBlockBytes})};
}

std::shared_ptr<MoeJob> start(Layer& layer, const MoeInput& input, float* output) {
  const py::gil_scoped_release nogil;
  return layer.start(input, output);
}

void copy_output(const MoeJob& job, float* out) {
  const py::gil_scoped_release nogil;
  job.copy_output(out);
}

// A layer that Python can close while other threads are inside a call: each call holds what it uses. `layer_` itself
// is read and changed under the GIL.
class PyLayer {
 public:
  PyLayer(std::shared_ptr<Runtime> runtime, int hidden, int intermediate, int experts, int per_token, int room)
      : layer_(std::make_shared<Layer>(std::move(runtime), LayerShape{hidden, intermediate, experts, per_token},
                                       room)) {}

  size_t bytes() const { return open()->experts().bytes(); }

  void load_expert(int expert, const py::array& gate, const py::array& gate_scale, const py::array& up,
                   const py::array& up_scale, const py::array& down, const py::array& down_scale) {
    const std::shared_ptr<Layer> layer = open();
    const LayerShape& s = layer->experts().shape();
    const PackedMatrix g = packed_matrix("gate", gate, gate_scale, s.intermediate, s.hidden);
    const PackedMatrix u = packed_matrix("up", up, up_scale, s.intermediate, s.hidden);
    const PackedMatrix d = packed_matrix("down", down, down_scale, s.hidden, s.intermediate);
    const py::gil_scoped_release nogil;
    layer->experts().pack(expert, g, u, d);
  }

  // The expert from the files of a checkpoint, each tensor as (name, path, fd, offset, bytes).
  using Tensor = std::tuple<std::string, std::string, int, int64_t, int64_t>;
  void load_stored(int expert, const std::array<Tensor, 6>& tensors, ReadMode mode) {
    auto tensor = [&](int i) {
      const auto& [name, path, fd, offset, bytes] = tensors[i];
      return StoredTensor{name, path, fd, offset, bytes};
    };
    const StoredExpert stored{
        {tensor(0), tensor(1)}, {tensor(2), tensor(3)}, {tensor(4), tensor(5)}};
    const std::shared_ptr<Layer> layer = open();
    const py::gil_scoped_release nogil;
    k2::read_expert(stored, mode, layer->experts(), expert);
  }

  // (gate, gate_scale, up, up_scale, down, down_scale) as they were loaded.
  py::tuple read_expert(int expert) const {
    const std::shared_ptr<Layer> layer = open();
    const int i = layer->experts().shape().intermediate, h = layer->experts().shape().hidden;
    Array<int32_t> gate({i, h / 8}), up({i, h / 8}), down({h, i / 8});
    Array<uint16_t> gate_scale({i, h / kGroup}), up_scale({i, h / kGroup}), down_scale({h, i / kGroup});
    auto view = [](Array<int32_t>& words, Array<uint16_t>& scales, int rows, int inputs) {
      return MutablePackedMatrix{reinterpret_cast<uint32_t*>(words.mutable_data()), scales.mutable_data(), rows,
                                 inputs};
    };
    const MutablePackedMatrix g = view(gate, gate_scale, i, h), u = view(up, up_scale, i, h),
                              d = view(down, down_scale, h, i);
    without_gil([&] { layer->experts().unpack(expert, g, u, d); });
    return py::make_tuple(gate, gate_scale, up, up_scale, down, down_scale);
  }

  // The expert in layout L32: w13 [I/16, H/32, 576] and w2 [H/32, I/32, 576], copied.
  py::tuple read_l32(int expert) const {
    const std::shared_ptr<Layer> layer = open();
    const LayerShape& s = layer->experts().shape();
    Array<uint8_t> w13({s.intermediate / kHalfBlock, s.hidden_groups(), kBlockBytes});
    Array<uint8_t> w2({s.hidden_groups(), s.intermediate_groups(), kBlockBytes});
    uint8_t *w13_data = w13.mutable_data(), *w2_data = w2.mutable_data();
    without_gil([&] { layer->experts().copy_l32(expert, w13_data, w2_data); });
    return py::make_tuple(w13, w2);
  }

  // The memory of one expert, not copied, for each NUMA node: w13 [2 n, H/32, 576] and w2 [H/32, n, 576] of its n groups
  // of 32 intermediate channels. It is there as long as an array refers to it.
  std::vector<std::pair<py::array, py::array>> view_expert(int expert) const {
    const std::shared_ptr<Layer> layer = open();
    const ExpertLayer& experts = layer->experts();
    experts.check_loaded(expert);
    const py::capsule owner(new std::shared_ptr<Layer>(layer),
                            [](void* held) { delete static_cast<std::shared_ptr<Layer>*>(held); });
    std::vector<std::pair<py::array, py::array>> views;
    const int64_t groups = experts.shape().hidden_groups();
    for (int node = 0; node < experts.nodes(); ++node) {
      const int64_t count = experts.channels(node).count;
      views.emplace_back(Array<uint8_t>({2 * count, groups, int64_t(kBlockBytes)}, experts.w13(expert, node), owner),
                         Array<uint8_t>({groups, count, int64_t(kBlockBytes)}, experts.w2(expert, node), owner));
    }
    return views;
  }

  // Address and bytes of each node's memory.
  std::vector<std::pair<uintptr_t, size_t>> memory() const {
    std::vector<std::pair<uintptr_t, size_t>> ranges;
    for (const HugeBuffer* buffer : open()->experts().buffers()) {
      ranges.emplace_back(reinterpret_cast<uintptr_t>(buffer->data()), buffer->bytes());
    }
    return ranges;
  }

  // Takes an expert in the form of read_l32, with its checksum.
  void store_expert(int expert, const py::array& w13, const py::array& w2, uint64_t checksum) {
    const std::shared_ptr<Layer> layer = open();
    const auto [w13_data, w2_data] = l32(layer->experts().shape(), w13, w2);
    const py::gil_scoped_release nogil;
    layer->experts().store(expert, w13_data, w2_data, checksum);
  }

  // Puts `now`, in the form of read_l32 and with its checksum, into the place of `old`.
  void replace_expert(int old, int now, const py::array& w13, const py::array& w2, uint64_t checksum) {
    const std::shared_ptr<Layer> layer = open();
    const auto [w13_data, w2_data] = l32(layer->experts().shape(), w13, w2);
    const py::gil_scoped_release nogil;
    layer->experts().replace(old, now, w13_data, w2_data, checksum);
  }

  // The checksum of an expert in the form of read_l32.
  uint64_t l32_checksum(const py::array& w13, const py::array& w2) const {
    const LayerShape shape = open()->experts().shape();
    const auto [w13_data, w2_data] = l32(shape, w13, w2);
    const py::gil_scoped_release nogil;
    return digest_expert(w13_data, w2_data, shape.w13_bytes(), shape.w2_bytes());
  }

  // Whether the weights are on the NUMA nodes that were asked for.
  bool bound() const { return open()->experts().bound(); }

  // The part of the weights in memory that lies on huge pages; None while there is none.
  std::optional<double> huge_page_share() const {
    const std::shared_ptr<Layer> layer = open();
    const py::gil_scoped_release nogil;
    const PageCount count = layer->experts().count_pages();
    if (count.resident == 0) return std::nullopt;
    return double(count.huge) / double(count.resident);
  }

  bool loaded(int expert) const {
    const std::shared_ptr<Layer> layer = open();
    return expert >= 0 && expert < layer->experts().shape().experts && layer->experts().loaded(expert);
  }

  uint64_t checksum(int expert) const { return open()->experts().checksum(expert); }

  uint64_t memory_checksum(int expert) const {
    const std::shared_ptr<Layer> layer = open();
    const py::gil_scoped_release nogil;
    return layer->experts().memory_checksum(expert);
  }

  // hidden: float32, or bf16 as uint16, [T, H]; ids int32 and weights float32 [T, K]; output float32 [T, H].
  void forward(const py::array& hidden, const py::array& ids, const py::array& weights, const py::array& output) {
    const std::shared_ptr<Layer> layer = open();
    const LayerShape& shape = layer->experts().shape();
    const MoeInput in = moe_input(shape, hidden, ids, weights);
    float* out = mutable_matrix<float>("output", output, in.tokens, shape.hidden);
    const std::shared_ptr<MoeJob> job = start(*layer, in, out);
    finish(layer->runtime().pool, *job, std::nullopt);
  }

  void submit(int slot, const py::array& hidden, const py::array& ids, const py::array& weights) {
    const std::shared_ptr<Layer> layer = open();
    const MoeInput input = moe_input(layer->experts().shape(), hidden, ids, weights);
    const py::gil_scoped_release nogil;
    layer->submit(slot, input);
  }

  // False if the time runs out; the slot then stays in flight.
  bool wait(int slot, const py::array& output, double timeout_s) {
    const std::shared_ptr<Layer> layer = open();
    const std::shared_ptr<MoeJob> job = layer->in_flight(slot);
    float* out = mutable_matrix<float>("output", output, job->tokens(), layer->experts().shape().hidden);
    Deadline deadline;
    if (timeout_s >= 0) deadline = Clock::now() + std::chrono::nanoseconds(int64_t(std::min(timeout_s, 1e9) * 1e9));
    try {
      if (!finish(layer->runtime().pool, *job, deadline)) return false;
    } catch (...) {
      layer->release(slot, job);
      throw;
    }
    layer->release(slot, job);
    copy_output(*job, out);
    return true;
  }

  int slot_tokens(int slot) const { return open()->in_flight(slot)->tokens(); }

  void close() {
    const std::shared_ptr<Layer> layer = std::move(layer_);
    if (!layer) return;
    const py::gil_scoped_release nogil;
    layer->end();
  }

  std::shared_ptr<Layer> open() const {
    if (!layer_) throw EngineError("experts: expected an open layer, got a closed one");
    return layer_;
  }

 private:
  std::shared_ptr<Layer> layer_;
};

}  // namespace

std::shared_ptr<Layer> open_layer(const py::handle& layer) { return layer.cast<const PyLayer&>().open(); }

void bind_experts(py::module_& m) {
  py::enum_<ReadMode>(m, "ReadMode")
      .value("auto", ReadMode::kAuto)
      .value("buffered", ReadMode::kBuffered)
      .value("direct", ReadMode::kDirect);

  py::class_<PyLayer>(m, "Layer")
      .def(py::init<std::shared_ptr<Runtime>, int, int, int, int, int>(), py::arg("runtime"), py::arg("hidden_size"),
           py::arg("moe_intermediate_size"), py::arg("n_routed_experts"), py::arg("num_experts_per_tok"),
           py::arg("room"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("nbytes", &PyLayer::bytes)
      .def_property_readonly("bound", &PyLayer::bound)
      .def_property_readonly("huge_page_share", &PyLayer::huge_page_share)
      .def("load_expert", &PyLayer::load_expert, py::arg("expert"), py::arg("gate"), py::arg("gate_scale"),
           py::arg("up"), py::arg("up_scale"), py::arg("down"), py::arg("down_scale"))
      .def("load_stored", &PyLayer::load_stored, py::arg("expert"), py::arg("tensors"),
           py::arg("mode") = ReadMode::kAuto)
      .def("read_expert", &PyLayer::read_expert, py::arg("expert"))
      .def("loaded", &PyLayer::loaded, py::arg("expert"))
      .def("checksum", &PyLayer::checksum, py::arg("expert"))
      .def("memory_checksum", &PyLayer::memory_checksum, py::arg("expert"))
      .def("read_l32", &PyLayer::read_l32, py::arg("expert"))
      .def("view_expert", &PyLayer::view_expert, py::arg("expert"))
      .def("memory", &PyLayer::memory)
      .def("store_expert", &PyLayer::store_expert, py::arg("expert"), py::arg("w13"), py::arg("w2"),
           py::arg("checksum"))
      .def("replace_expert", &PyLayer::replace_expert, py::arg("old"), py::arg("now"), py::arg("w13"), py::arg("w2"),
           py::arg("checksum"))
      .def("l32_checksum", &PyLayer::l32_checksum, py::arg("w13"), py::arg("w2"))
      .def("forward", &PyLayer::forward, py::arg("hidden"), py::arg("ids"), py::arg("weights"), py::arg("output"))
      .def("submit", &PyLayer::submit, py::arg("slot"), py::arg("hidden"), py::arg("ids"), py::arg("weights"))
      .def("wait", &PyLayer::wait, py::arg("slot"), py::arg("output"), py::arg("timeout_s") = -1.0)
      .def("slot_tokens", &PyLayer::slot_tokens, py::arg("slot"))
      .def("close", &PyLayer::close);
}

}  // namespace k2
