// Dense layers on AVX2 and FMA.
#include <immintrin.h>

#include "kernels/dense_step.h"
#include "kernels/kernel_file.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"
// each on those before:
#include "kernels/a16-inl.h"

#include "kernels/dense_fetch-inl.h"

#include "kernels/avx2/dense_probes-inl.h"
#include "kernels/avx2/dense_tile-inl.h"

#include "kernels/dense-inl.h"

}  // namespace

extern const DenseTable dense_table;
constinit const DenseTable dense_table = with_dense_kernels("avx2");

}  // namespace k2::avx2
