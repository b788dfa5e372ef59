// The mailbox of the routed experts for Python, whose threads speak its protocol as a GPU would.
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "handoff/expert_server.h"

namespace k2 {
namespace {

Deadline deadline_in(double seconds) {
  if (seconds < 0) return std::nullopt;
  return Clock::now() + std::chrono::nanoseconds(int64_t(std::min(seconds, 1e9) * 1e9));
}

class PyMailbox {
 public:
  PyMailbox(std::shared_ptr<Runtime> runtime, int hidden, int per_token, int tokens,
            const std::map<int, py::object>& layers)
      : runtime_(std::move(runtime)), mailbox_(std::make_unique<Mailbox>(hidden, per_token, tokens)) {
    std::map<int, std::shared_ptr<Layer>> open;
    for (const auto& [number, object] : layers) {
      const std::shared_ptr<Layer> layer = open_layer(object);
      const LayerShape& shape = layer->experts().shape();
      check_argument(&layer->runtime() == runtime_.get(), "layers", "layers of one runtime", text("layer ", number));
      check_argument(shape.hidden == hidden && shape.experts_per_token == per_token, "layers",
                     text(hidden, " channels and ", per_token, " experts per token"), text("layer ", number));
      open.emplace(number, layer);
    }
    auto start = [open = std::move(open)](int number, const MoeInput& input, float* output) -> std::shared_ptr<Job> {
      const auto found = open.find(number);
      if (found == open.end()) throw EngineError("expected a layer with experts, got one without");
      return found->second->start(input, output);
    };
    server_.reset(new ExpertServer(runtime_->pool, *mailbox_, std::move(start)));
  }

  ~PyMailbox() {
    if (runtime_->pool.forked()) {
      mailbox_.release();  // the server is leaked, and refers to it
    } else {
      const py::gil_scoped_release nogil;
      server_.reset();
    }
  }

  void post(int slot, int layer, const py::array& hidden, const py::array& ids, const py::array& weights) {
    const MoeInput input = moe_input({mailbox_->hidden, 0, 0, mailbox_->per_token}, hidden, ids, weights);
    runtime_->pool.check_process();
    const py::gil_scoped_release nogil;
    mailbox_->post(slot, layer, input);
    server_->wake();
  }

  // For a payload that is in its areas already.
  void raise_request(int slot, int layer, int tokens, bool bf16) {
    mailbox_->raise_request(slot, layer, tokens, bf16);
    server_->wake();
  }

  // Waits for a reply of any kind; false if the time runs out.
  bool wait_reply(int slot, double timeout_s) {
    return wait([&](Deadline deadline) { return server_->wait_reply(slot, deadline); }, deadline_in(timeout_s));
  }

  int tokens(int slot) const { return mailbox_->posted_tokens(slot); }

  // False if the time runs out; EngineError with the reason if the computation failed.
  bool take(int slot, const py::array& output, double timeout_s) {
    float* out = mutable_matrix<float>("output", output, tokens(slot), mailbox_->hidden);
    if (!wait_reply(slot, timeout_s)) return false;
    const ReplyStatus status = mailbox_->status(slot);
    if (status == ReplyStatus::kFailed) throw EngineError(server_->failure(slot));
    if (status == ReplyStatus::kGivenUp) throw EngineError("expected a result, got a computation that was given up");
    const py::gil_scoped_release nogil;
    if (tokens(slot) > 0) std::copy_n(mailbox_->output(slot), size_t(tokens(slot)) * size_t(mailbox_->hidden), out);
    return true;
  }

  // False if the computation in the slot does not end in time.
  bool give_up(int slot, double timeout_s) {
    return wait([&](Deadline deadline) { return server_->give_up(slot, deadline); }, deadline_in(timeout_s));
  }

  // (layer, slot, tokens, start, stop) of the computations that ended since `keep_times(True)` or the last call.
  std::vector<std::tuple<int, int, int, int64_t, int64_t>> take_times() {
    std::vector<std::tuple<int, int, int, int64_t, int64_t>> out;
    for (const ExpertServer::JobTime& t : server_->take_times()) {
      out.emplace_back(t.layer, t.slot, t.tokens, t.start, t.stop);
    }
    return out;
  }

  // For a GPU. (layer, reason) of the first failure since the last call, or None.
  std::optional<std::tuple<int, std::string>> take_failure() {
    const std::optional<ExpertServer::Failure> failure = server_->take_failure();
    if (!failure) return std::nullopt;
    return std::tuple(failure->layer, failure->reason);
  }
  void keep_awake(bool awake) { server_->keep_awake(awake); }
  void release() { mailbox_->release(); }

  // (address, bytes) of all memory that an accelerator reads and writes.
  std::vector<std::tuple<uintptr_t, size_t>> blocks() const {
    std::vector<std::tuple<uintptr_t, size_t>> out{{uintptr_t(mailbox_->lines_data()), mailbox_->lines_bytes()}};
    for (int slot = 0; slot < kMailboxSlots; ++slot) {
      const HugeBuffer& memory = mailbox_->payload(slot).memory;
      out.emplace_back(uintptr_t(memory.data()), memory.bytes());
    }
    return out;
  }

  // A slot's areas as arrays over that memory, valid until a larger batch is posted by a thread: (request [4], reply [2],
  // hidden [room, H], ids [room, K], weights [room, K], output [room, H]).
  static py::tuple areas(const py::object& self, int slot) {
    const Mailbox& m = *self.cast<PyMailbox&>().mailbox_;
    check_argument(slot >= 0 && slot < kMailboxSlots, "slot", text("0..", kMailboxSlots - 1), slot);
    const Mailbox::Payload& p = m.payload(slot);
    SlotLines* lines = reinterpret_cast<SlotLines*>(m.lines_data()) + slot;
    return py::make_tuple(py::array_t<int32_t>(4, reinterpret_cast<int32_t*>(&lines->request), self),
                          py::array_t<int32_t>(2, reinterpret_cast<int32_t*>(&lines->reply), self),
                          py::array_t<float>({p.tokens, m.hidden}, reinterpret_cast<float*>(p.hidden), self),
                          py::array_t<int32_t>({p.tokens, m.per_token}, p.ids, self),
                          py::array_t<float>({p.tokens, m.per_token}, p.weights, self),
                          py::array_t<float>({p.tokens, m.hidden}, p.output, self));
  }

  void keep_times(bool keep) { server_->keep_times(keep); }

  void close() {
    const py::gil_scoped_release nogil;
    server_->stop();
  }

 private:
  // In short pieces with the GIL released; Ctrl-C ends it.
  template <class Wait>
  static bool wait(Wait done, Deadline deadline) {
    for (;;) {
      {
        const py::gil_scoped_release nogil;
        const Clock::time_point slice = Clock::now() + kSignalCheck;
        if (done(deadline ? std::min(*deadline, slice) : slice)) return true;
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (deadline && Clock::now() >= *deadline) return false;
    }
  }

  std::shared_ptr<Runtime> runtime_;
  std::unique_ptr<Mailbox> mailbox_;
  ExpertServerPointer server_;
};

}  // namespace

void bind_handoff(py::module_& m) {
  py::class_<PyMailbox>(m, "Mailbox")
      .def(py::init<std::shared_ptr<Runtime>, int, int, int, const std::map<int, py::object>&>(), py::arg("runtime"),
           py::arg("hidden_size"), py::arg("num_experts_per_tok"), py::arg("tokens"), py::arg("layers"))
      .def("post", &PyMailbox::post, py::arg("slot"), py::arg("layer"), py::arg("hidden"), py::arg("ids"),
           py::arg("weights"))
      .def("raise_request", &PyMailbox::raise_request, py::arg("slot"), py::arg("layer"), py::arg("tokens"),
           py::arg("bf16"))
      .def("wait_reply", &PyMailbox::wait_reply, py::arg("slot"), py::arg("timeout_s") = -1.0)
      .def("tokens", &PyMailbox::tokens, py::arg("slot"))
      .def("take", &PyMailbox::take, py::arg("slot"), py::arg("output"), py::arg("timeout_s") = -1.0)
      .def("give_up", &PyMailbox::give_up, py::arg("slot"), py::arg("timeout_s") = -1.0)
      .def("take_failure", &PyMailbox::take_failure)
      .def("keep_awake", &PyMailbox::keep_awake, py::arg("awake"))
      .def("release", &PyMailbox::release)
      .def("blocks", &PyMailbox::blocks)
      .def("areas", &PyMailbox::areas, py::arg("slot"))
      .def("keep_times", &PyMailbox::keep_times, py::arg("keep"))
      .def("take_times", &PyMailbox::take_times)
      .def("close", &PyMailbox::close);
}

}  // namespace k2
