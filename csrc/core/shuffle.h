// Lanes of two vectors in a new order, in the words of GCC or Clang: 0..n-1 are those of `a`, from n on those of `b`.
#pragma once

#if defined(__clang__)
#define K2_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define K2_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif
