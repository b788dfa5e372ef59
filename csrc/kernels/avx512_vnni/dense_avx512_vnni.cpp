// Dense layers on AVX-512.
#include <immintrin.h>

#include "kernels/dense_step.h"
#include "kernels/kernel_file.h"

namespace k2::avx512_vnni {
namespace {

#include "kernels/avx512_vnni/lanes-inl.h"
// each on those before:
#include "kernels/a16-inl.h"

#include "kernels/dense_fetch-inl.h"

#include "kernels/avx512_vnni/dense_probes-inl.h"
#include "kernels/avx512_vnni/dense_tile-inl.h"

#include "kernels/dense-inl.h"

}  // namespace

extern const DenseTable dense_table;
constinit const DenseTable dense_table = with_dense_kernels("avx512_vnni");

}  // namespace k2::avx512_vnni
