// Dense layers in plain C++ for every CPU: the definition, not a fast path.
#include "kernels/dense_step.h"
#include "kernels/kernel_file.h"

namespace k2::portable {
namespace {

#include "kernels/portable/lanes-inl.h"
// each on those before:
#include "kernels/a16-inl.h"

#include "kernels/portable/dense_probes-inl.h"
#include "kernels/portable/dense_tile-inl.h"

#include "kernels/dense-inl.h"

}  // namespace

extern const DenseTable dense_table;
constinit const DenseTable dense_table = with_dense_kernels("portable");

}  // namespace k2::portable
