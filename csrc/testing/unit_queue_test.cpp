// Every unit is taken once, by however many workers and in whatever order they come; a worker's next unit is what it said.
#include "cpu/unit_queue.h"

#include <thread>
#include <vector>

#include "testing/check.h"

namespace k2 {
namespace {

using Deal = UnitQueue::Deal;

void all_at_once(Deal deal, int64_t units, int workers) {
  UnitQueue queue(deal, units, workers);
  std::vector<std::vector<int64_t>> taken(static_cast<size_t>(workers));
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    threads.emplace_back([&, worker] {
      for (UnitQueue::Unit unit = queue.take(worker); unit.unit >= 0; unit = queue.take(worker)) {
        taken[size_t(worker)].push_back(unit.unit);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<int> times(static_cast<size_t>(units));
  for (const std::vector<int64_t>& some : taken) {
    for (const int64_t unit : some) ++times.at(size_t(unit));
  }
  for (const int count : times) K2_EXPECT(count == 1);
}

// A worker alone takes its own units first: each is the next one of the unit before it.
void knows_what_comes_next(Deal deal, int64_t units, int workers) {
  UnitQueue queue(deal, units, workers);
  int64_t own = 0, others = 0, expected = -1;
  for (UnitQueue::Unit unit = queue.take(0); unit.unit >= 0; unit = queue.take(0)) {
    if (expected >= 0) K2_EXPECT(unit.unit == expected);
    const bool mine = deal == Deal::kRuns ? unit.unit < units / workers : unit.unit % workers == 0;
    mine ? ++own : ++others;
    K2_EXPECT(!mine || others == 0);
    expected = unit.next;
  }
  K2_EXPECT(own + others == units);
  K2_EXPECT(own == (deal == Deal::kRuns ? units / workers : (units + workers - 1) / workers));
}

}  // namespace
}  // namespace k2

int main() {
  using namespace k2;
  for (const Deal deal : {Deal::kRuns, Deal::kRoundRobin}) {
    for (const int workers : {1, 2, 5}) {
      for (const int64_t units : {0, 1, 4, 7, 1000}) {
        all_at_once(deal, units, workers);
        knows_what_comes_next(deal, units, workers);
      }
    }
  }
  std::puts("ok");
}
