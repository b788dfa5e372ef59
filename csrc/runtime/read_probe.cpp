#include "runtime/read_probe.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/huge_buffer.h"
#include "cpu/share.h"
#include "runtime/timing.h"

namespace k2 {
namespace {

// Each worker takes its contiguous share: the first pass writes it, the others read it.
class Pass final : public Job {
 public:
  Pass(ThreadPool& pool, const KernelTable& table, const HugeBuffer& buffer, bool touch)
      : Job(pool), table_(table), buffer_(buffer), touch_(touch) {}

  uint64_t result() const { return result_.load(); }

 private:
  void run(Team& team, int worker) override {
    const Share share{worker, team.workers()};
    const int64_t units = int64_t(buffer_.bytes() / kProbeUnit);
    const size_t first = size_t(share.begin(units)) * kProbeUnit, last = size_t(share.end(units)) * kProbeUnit;
    if (touch_) {
      std::memset(buffer_.data() + first, 1, last - first);
    } else if (first < last) {
      result_.fetch_xor(table_.read(buffer_.data() + first, last - first));
    }
  }

  const KernelTable& table_;
  const HugeBuffer& buffer_;
  const bool touch_;
  std::atomic<uint64_t> result_{0};
};

}  // namespace

double measure_read_gbps(ThreadPool& pool, const KernelTable& table, double seconds, size_t bytes) {
  const size_t least = size_t(pool.workers()) * kProbeUnit;
  check_argument(bytes >= least, "bytes", text("at least ", least), bytes);
  const HugeBuffer buffer(bytes / kProbeUnit * kProbeUnit);
  Pass touch(pool, table, buffer, true);
  time_job(pool, touch);
  double best = 1e9;
  for (double spent = 0; spent < seconds || best == 1e9;) {
    Pass read(pool, table, buffer, false);
    const double pass_seconds = time_job(pool, read);
    best = std::min(best, pass_seconds);
    spent += pass_seconds;
  }
  return double(buffer.bytes()) / best / 1e9;
}

}  // namespace k2
