// Fetching later weights while a dense tile computes, on x86; included before the tiles.

// Asks for the line `ahead` bytes on; 0: for none.
K2_INLINE void prefetch_ahead(const uint8_t* at, int ahead) {
  if (ahead) _mm_prefetch(reinterpret_cast<const char*>(at) + ahead, _MM_HINT_T1);
}

// The pass'th of the passes over a step's groups fetches its share of the lines, some with each group.
struct Fetch {
  Fetch(const DenseStep& step, int pass, int passes)
      : lines((step.fetch_lines + passes - 1) / passes), next(step.fetch + ptrdiff_t(64) * pass * step.groups * lines) {}

  K2_INLINE void with_group() {
    for (int i = 0; i < lines; ++i) fetch(i);
    end_group();
  }

  // With each of the 16 parts of a group instead, one or two of up to 32 lines: on Emerald Rapids a group's lines at once
  // are more than a core can wait for. On AVX2 this costs more than it gains. `end_group` follows the parts.
  K2_INLINE void with_part(int part) const {
    if (part < lines) fetch(part);
    if (part + 16 < lines) fetch(part + 16);
  }

  K2_INLINE void end_group() { next += 64 * lines; }

  const int lines;
  const uint8_t* next;

 private:
  K2_INLINE void fetch(int line) const { _mm_prefetch(reinterpret_cast<const char*>(next + 64 * line), _MM_HINT_T1); }
};
