// How workers cut work into contiguous parts, as equal as they go.
#pragma once
#include <cstdint>

namespace k2 {

// Of `of` workers, the part of the one of this rank: begin..end-1 of `count`.
struct Share {
  int rank;
  int of;

  template <class Count>
  Count begin(Count count) const {
    return Count(int64_t(count) * rank / of);
  }
  template <class Count>
  Count end(Count count) const {
    return Count(int64_t(count) * (rank + 1) / of);
  }
};

}  // namespace k2
