#include "attention/latent_pages.h"

#include <algorithm>

#include "core/error.h"

namespace k2 {

void LatentPages::check(const AttentionSequence& s, int64_t rows) const {
  // Texts are made for errors only: this is on the path of every decode step.
  if (s.rows < 1 || s.first_row < 0 || s.first_row > rows - s.rows || s.cached < 0 || s.first_page < 0) {
    check_argument(false, "sequences", text("rows of ", rows),
                   text(s.first_row, " + ", s.rows, " behind ", s.cached, " tokens from page ", s.first_page));
  }
  const int64_t room = std::max<int64_t>(0, table_size - s.first_page) * tokens;
  if (s.rows > room || s.cached > room - s.rows) {
    check_argument(false, "page_table", text("pages for ", s.cached, " + ", s.rows, " tokens"),
                   text("room for ", room));
  }
  const int64_t pages = (s.cached + s.rows + tokens - 1) / tokens;
  for (int64_t i = s.first_page; i < s.first_page + pages; ++i) {
    if (table[i] >= 0 && table[i] < count) continue;
    check_argument(false, "page_table", text("pages below ", count), table[i]);
  }
}

}  // namespace k2
