// What every instruction set's file includes before its own halves. Only C headers and plain data: an inline function
// with external linkage would be merged by the linker with the baseline's copy and could run on the wrong CPU.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/a16.h"
#include "kernels/kernel_table.h"
#include "kernels/l32.h"

#define K2_INLINE inline __attribute__((always_inline))
