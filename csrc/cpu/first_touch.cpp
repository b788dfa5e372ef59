#include "cpu/first_touch.h"

#include <algorithm>

#include "cpu/share.h"

namespace k2 {
namespace {

constexpr size_t kPage = 4096;  // the smallest

class TouchJob final : public Job {
 public:
  TouchJob(ThreadPool& pool, const std::vector<const HugeBuffer*>& buffers) : Job(pool), buffers_(buffers) {}

 private:
  void run(Team& team, int worker) override {
    const int node = team.node(worker);
    const Share share{team.rank(worker), team.node_workers(node)};
    const HugeBuffer& buffer = *buffers_[node];
    if (buffer.bound()) return;
    const size_t pages = (buffer.bytes() + kPage - 1) / kPage;
    for (size_t page = share.begin(pages); page < share.end(pages); ++page) {
      static_cast<volatile uint8_t*>(buffer.data())[page * kPage] = 0;
      if (page % 65536 == 0) team.check_cancelled();
    }
  }

  const std::vector<const HugeBuffer*>& buffers_;
};

}  // namespace

void first_touch(ThreadPool& pool, const std::vector<const HugeBuffer*>& buffers) {
  if (std::all_of(buffers.begin(), buffers.end(), [](const HugeBuffer* buffer) { return buffer->bound(); })) return;
  TouchJob job(pool, buffers);
  pool.submit(job);
  pool.finish(job);
  job.rethrow();
}

}  // namespace k2
