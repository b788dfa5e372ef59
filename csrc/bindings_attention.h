// What the bindings of attention and of whole layers share.
#pragma once
#include <vector>

#include "attention/latent_pages.h"
#include "bindings.h"

namespace k2 {

// int64 [S, 4].
std::vector<AttentionSequence> read_sequences(const py::array& array);

// pages [pages, page_tokens, latent] float32 or bf16 as uint16; page_table [P] int64.
LatentPages latent_pages(const MlaSizes& sizes, const py::array& pages, const py::array& page_table);

}  // namespace k2
