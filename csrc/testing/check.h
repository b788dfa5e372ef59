// The smallest test frame: a failed check prints where and exits with 1.
#pragma once
#include <cstdio>
#include <cstdlib>

#define K2_EXPECT(condition)                                                        \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)
