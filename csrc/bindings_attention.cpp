// Attention in the Python module; see hybrid_k2/model/native_attention.py.
#include "attention/latent_attention.h"
#include "bindings.h"

namespace k2 {
namespace {

// bf16 as uint16, or float32.
const void* numbers(const char* name, const py::array& array, bool bf16, std::initializer_list<int64_t> shape) {
  if (bf16) return array_data<uint16_t>(name, array, shape);
  return array_data<float>(name, array, shape);
}

bool is_bf16(const py::array& array) { return py::isinstance<Array<uint16_t>>(array); }

std::vector<AttentionSequence> read_sequences(const py::array& array) {
  const int64_t count = array.ndim() == 2 ? array.shape(0) : 0;
  const int64_t* row = array_data<int64_t>("sequences", array, {count, 4});
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < count; ++i, row += 4) sequences.push_back({row[0], row[1], row[2], row[3]});
  return sequences;
}

// q [T, heads, nope + rope] float32; kv_b [heads * (nope + value), kv_lora] and pages [pages, page_tokens, latent]
// float32 or bf16 as uint16; page_table [P] int64; sequences [S, 4] int64; out [T, heads, value] float32.
AttentionInput attention_input(const MlaSizes& s, const py::array& q, const py::array& kv_b, const py::array& pages,
                               const py::array& page_table, const py::array& sequences, const py::array& out) {
  const int64_t tokens = q.ndim() == 3 ? q.shape(0) : 0;
  const int64_t page_count = pages.ndim() == 3 ? pages.shape(0) : 0;
  const int64_t page_tokens = pages.ndim() == 3 ? pages.shape(1) : 0;
  const int64_t table_pages = page_table.ndim() == 1 ? page_table.shape(0) : 0;
  const bool kv_b_bf16 = is_bf16(kv_b), pages_bf16 = is_bf16(pages);
  if (page_tokens < 1) {
    check_argument(false, "pages", text("shape [pages, tokens >= 1, ", s.latent, "]"), shape_text(pages));
  }
  return {.q = array_data<float>("q", q, {tokens, s.heads, s.nope + s.rope}),
          .tokens = tokens,
          .kv_b = numbers("kv_b", kv_b, kv_b_bf16, {int64_t(s.heads) * (s.nope + s.value), s.kv_lora}),
          .kv_b_bf16 = kv_b_bf16,
          .pages = numbers("pages", pages, pages_bf16, {page_count, page_tokens, s.latent}),
          .pages_bf16 = pages_bf16,
          .page_count = page_count,
          .page_tokens = page_tokens,
          .page_table = array_data<int64_t>("page_table", page_table, {table_pages}),
          .table_pages = table_pages,
          .sequences = read_sequences(sequences),
          .out = mutable_array_data<float>("out", out, {tokens, s.heads, s.value})};
}

void attend(LatentAttention& attention, const py::array& q, const py::array& kv_b, const py::array& pages,
            const py::array& page_table, const py::array& sequences, const py::array& out) {
  AttentionInput input = attention_input(attention.sizes(), q, kv_b, pages, page_table, sequences, out);
  std::unique_ptr<AttentionWorkspace> workspace = attention.take_workspace();
  std::unique_ptr<AttentionJob> job;
  {
    const py::gil_scoped_release nogil;
    job = attention.start(std::move(input), *workspace);
  }
  finish(attention.pool(), *job);
  job.reset();
  attention.give_workspace(std::move(workspace));
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<LatentAttention>(m, "LatentAttention")
      .def(py::init([](std::shared_ptr<Runtime> runtime, int heads, int nope, int rope, int value, int kv_lora,
                       float scale) {
             return std::make_unique<LatentAttention>(std::move(runtime), mla_sizes(heads, nope, rope, value, kv_lora),
                                                      scale);
           }),
           py::arg("runtime"), py::arg("heads"), py::arg("nope"), py::arg("rope"), py::arg("value"),
           py::arg("kv_lora"), py::arg("scale"))
      .def_property_readonly("isa", &LatentAttention::isa)
      .def(
          "measure_peak_gops",
          [](LatentAttention& a, double seconds) { return measure_peak_gops(a.pool(), a.peak(), seconds); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("attend", &attend, py::arg("q"), py::arg("kv_b"), py::arg("pages"), py::arg("page_table"),
           py::arg("sequences"), py::arg("out"));
}

}  // namespace k2
