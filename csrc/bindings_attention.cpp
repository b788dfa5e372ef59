// Attention in the Python module; see hybrid_k2/model/native_attention.py.
#include "attention/append.h"
#include "attention/latent_attention.h"
#include "bindings_attention.h"
#include "bindings_rows.h"

namespace k2 {

std::vector<AttentionSequence> read_sequences(const py::array& array) {
  const int64_t count = array.ndim() == 2 ? array.shape(0) : 0;
  const int64_t* row = array_data<int64_t>("sequences", array, {count, 4});
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < count; ++i, row += 4) sequences.push_back({row[0], row[1], row[2], row[3]});
  return sequences;
}

LatentPages latent_pages(const MlaSizes& s, const py::array& pages, const py::array& page_table) {
  const int64_t count = pages.ndim() == 3 ? pages.shape(0) : 0, tokens = pages.ndim() == 3 ? pages.shape(1) : 0;
  const int64_t table_size = page_table.ndim() == 1 ? page_table.shape(0) : 0;
  const bool bf16 = is_bf16(pages);
  if (tokens < 1) {
    check_argument(false, "pages", text("shape [pages, tokens >= 1, ", s.latent, "]"), shape_text(pages));
  }
  return {.data = numbers("pages", pages, bf16, {count, tokens, s.latent}),
          .bf16 = bf16,
          .count = count,
          .tokens = tokens,
          .table = array_data<int64_t>("page_table", page_table, {table_size}),
          .table_size = table_size};
}

namespace {

int64_t rows_of(const py::array& q) { return q.ndim() == 3 ? q.shape(0) : 0; }

// q [T, heads, nope + rope] float32; kv_b [heads * (nope + value), kv_lora] float32 or bf16 as uint16; sequences [S, 4]
// int64; out [T, heads, value] float32.
AttentionInput attention_input(const MlaSizes& s, const py::array& q, const py::array& kv_b, const py::array& pages,
                               const py::array& page_table, const py::array& sequences, const py::array& out) {
  const int64_t tokens = rows_of(q);
  const bool kv_b_bf16 = is_bf16(kv_b);
  return {.q = array_data<float>("q", q, {tokens, s.heads, s.nope + s.rope}),
          .tokens = tokens,
          .kv_b = numbers("kv_b", kv_b, kv_b_bf16, {int64_t(s.heads) * (s.nope + s.value), s.kv_lora}),
          .kv_b_bf16 = kv_b_bf16,
          .pages = latent_pages(s, pages, page_table),
          .sequences = read_sequences(sequences),
          .out = mutable_array_data<float>("out", out, {tokens, s.heads, s.value})};
}

// latent [T, kv_lora + rope or more] float32; norm [kv_lora] float32 or bf16 as uint16; cos, sin [T, rope / 2] float32.
void append(LatentAttention& attention, const py::array& latent, const py::array& norm, float eps,
            const py::array& cos, const py::array& sin, const py::array& q, const py::array& pages,
            const py::array& page_table, const py::array& sequences) {
  const MlaSizes& s = attention.sizes();
  const int64_t tokens = rows_of(q), columns = latent.ndim() == 2 ? latent.shape(1) : 0;
  if (!pages.writeable()) check_argument(false, "pages", "a writable array", "a read-only one");
  const LatentPages where = latent_pages(s, pages, page_table);
  const Append rows(s, {.latent = array_data<float>("latent", latent, {tokens, columns}),
                        .latent_stride = columns,
                        .tokens = tokens,
                        .norm = norm_weight(norm, s.kv_lora, eps),
                        .cos = array_data<float>("cos", cos, {tokens, s.rope / 2}),
                        .sin = array_data<float>("sin", sin, {tokens, s.rope / 2}),
                        .q = mutable_array_data<float>("q", q, {tokens, s.heads, s.nope + s.rope}),
                        .pages = where,
                        .out = const_cast<void*>(where.data),
                        .sequences = read_sequences(sequences)});
  for_rows(&attention.pool(), rows.rows(), rows.width(), rows);
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
      .def("append", &append, py::arg("latent"), py::arg("norm"), py::arg("eps"), py::arg("cos"), py::arg("sin"),
           py::arg("q"), py::arg("pages"), py::arg("page_table"), py::arg("sequences"))
      .def("attend", &attend, py::arg("q"), py::arg("kv_b"), py::arg("pages"), py::arg("page_table"),
           py::arg("sequences"), py::arg("out"));
}

}  // namespace k2
