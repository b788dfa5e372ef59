#include "runtime/peak_probe.h"

#include <algorithm>

#include "runtime/timing.h"

namespace k2 {
namespace {

// Long against the start of a job, short against a time slice of the system.
constexpr double kPassSeconds = 1e-3;
constexpr int kMinPasses = 8;

class Pass final : public Job {
 public:
  Pass(ThreadPool& pool, const Peak& peak, int64_t rounds) : Job(pool), peak_(peak), rounds_(rounds) {}

 private:
  void run(Team&, int) override { result_.fetch_xor(peak_.run(rounds_)); }

  const Peak& peak_;
  const int64_t rounds_;
  std::atomic<uint64_t> result_{0};
};

}  // namespace

double measure_peak_gops(ThreadPool& pool, const Peak& peak, double seconds) {
  double spent = 0, best = 0;  // rounds per second
  for (int passes = 0; spent < seconds || passes < kMinPasses; ++passes) {
    const int64_t rounds = std::max<int64_t>(1024, int64_t(best * kPassSeconds));
    Pass pass(pool, peak, rounds);
    const double pass_seconds = time_job(pool, pass);
    spent += pass_seconds;
    best = std::max(best, double(rounds) / pass_seconds);
  }
  return best * double(peak.operations) * pool.workers() / 1e9;
}

}  // namespace k2
