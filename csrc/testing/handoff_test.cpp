// The mailbox and its server with experts that are late, fail or hang: handoff_test SEED SCHEDULES [under-a-tool]
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "handoff/expert_server.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr int kHidden = 3, kPerToken = 2;

Deadline in(Clock::duration time) { return Clock::now() + time; }

class Task final : public Job {
 public:
  Task(ThreadPool& pool, std::function<void(Team&, int)> body) : Job(pool), body_(std::move(body)) {}

 private:
  void run(Team& team, int worker) override { body_(team, worker); }
  std::function<void(Team&, int)> body_;
};

// What the experts of these tests compute for element h of a token.
float value(int layer, float hidden, const int32_t* ids, const float* weights) {
  return float(layer) * hidden + float(ids[0]) * weights[0] - float(ids[1]) * weights[1];
}

// A batch of random numbers, none of which two batches share but by accident.
struct Batch {
  Batch(Random& random, int tokens) : tokens(tokens) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < tokens * kHidden; ++i) hidden.push_back(normal(random));
    for (int i = 0; i < tokens * kPerToken; ++i) {
      ids.push_back(int32_t(random() % 1000));
      weights.push_back(normal(random));
    }
  }
  MoeInput input() const { return {hidden.data(), false, ids.data(), weights.data(), tokens}; }

  bool is_result(int layer, const float* output) const {
    for (int i = 0; i < tokens * kHidden; ++i) {
      const size_t token = size_t(i / kHidden) * kPerToken;
      if (output[i] != value(layer, hidden[size_t(i)], &ids[token], &weights[token])) return false;
    }
    return true;
  }

  int tokens;
  std::vector<float> hidden, weights;
  std::vector<int32_t> ids;
};

// Experts that read the payload in place, late, and write to it in place, one worker for each share of the tokens.
std::shared_ptr<Job> compute(ThreadPool& pool, int layer, const MoeInput& input, float* output,
                             std::function<void(Team&, int)> before = [](Team&, int) {}) {
  auto task = std::make_shared<Task>(pool, [=](Team& team, int worker) {
    before(team, worker);
    const float* hidden = static_cast<const float*>(input.hidden);
    for (int i = worker; i < input.tokens * kHidden; i += team.workers()) {
      const int token = i / kHidden * kPerToken;
      output[i] = value(layer, hidden[i], input.ids + token, input.weights + token);
    }
  });
  pool.submit(*task);
  return task;
}

// What workers do while the flag is set, or until their job is cancelled.
std::function<void(Team&, int)> held_by(const std::atomic<bool>& flag) {
  return [&flag](Team& team, int) {
    while (flag.load()) {
      team.check_cancelled();
      std::this_thread::sleep_for(microseconds(20));
    }
  };
}

struct House {
  explicit House(ExpertServer::Start start, int workers = 2, int tokens = 4)
      : pool(workers), mailbox(kHidden, kPerToken, tokens), server(new ExpertServer(pool, mailbox, std::move(start))) {}
  explicit House(int workers = 2, int tokens = 4)
      : House([this](int layer, const MoeInput& input, float* output) { return compute(pool, layer, input, output); },
              workers, tokens) {}

  void post(int slot, int layer, const Batch& batch) {
    mailbox.post(slot, layer, batch.input());
    server->wake();
  }
  void take(int slot, int layer, const Batch& batch) {
    K2_EXPECT(server->wait_reply(slot, in(std::chrono::seconds(60))));
    K2_EXPECT(mailbox.status(slot) == ReplyStatus::kDone);
    K2_EXPECT(batch.is_result(layer, mailbox.output(slot)));
  }

  ThreadPool pool;
  Mailbox mailbox;
  ExpertServerPointer server;
};

bool throws_engine_error(const std::function<void()>& call) {
  try {
    call();
  } catch (const EngineError&) {
    return true;
  }
  return false;
}

void two_slots_give_their_results(Random& random) {
  House house;
  house.server->keep_times(true);
  for (int layer = 0; layer < 50; ++layer) {
    const Batch a(random, int(random() % 9)), b(random, 1 + layer);  // more than there was room for
    house.post(0, layer, a);
    house.post(1, layer, b);
    house.take(1, layer, b);
    house.take(0, layer, a);
  }
  const auto times = house.server->take_times();
  K2_EXPECT(times.size() == 100);
  for (size_t i = 1; i < times.size(); ++i) {
    K2_EXPECT(times[i - 1].start <= times[i - 1].stop && times[i - 1].stop <= times[i].start);
    K2_EXPECT(times[i].layer == int(i / 2));
  }
  K2_EXPECT(house.server->take_times().empty());
}

void a_slot_in_flight_cannot_be_posted_to(Random& random) {
  House house;
  const Batch batch(random, 2);
  std::atomic<bool> held{true};
  house.server = nullptr;
  house.server.reset(new ExpertServer(house.pool, house.mailbox, [&](int layer, const MoeInput& input, float* output) {
    return compute(house.pool, layer, input, output, held_by(held));
  }));
  house.post(1, 3, batch);
  bool refused = false;
  try {
    house.mailbox.post(1, 3, batch.input());
  } catch (const ArgumentError&) {
    refused = true;
  }
  K2_EXPECT(refused);
  held.store(false);
  house.take(1, 3, batch);
}

void tickets_wrap(Random& random) {
  ThreadPool pool(1);
  Mailbox mailbox(kHidden, kPerToken, 2);
  for (int slot = 0; slot < kMailboxSlots; ++slot) {
    const uint32_t late = 0xfffffffd;
    reinterpret_cast<SlotLines*>(mailbox.lines_data())[slot].request.ticket.store(late);
    mailbox.reply(slot, late, ReplyStatus::kDone);
  }
  ExpertServer server(pool, mailbox,
                      [&](int layer, const MoeInput& input, float* out) { return compute(pool, layer, input, out); });
  for (int layer = 0; layer < 6; ++layer) {
    const Batch batch(random, 2);
    mailbox.post(layer % 2, layer, batch.input());
    server.wake();
    K2_EXPECT(server.wait_reply(layer % 2, in(std::chrono::seconds(60))));
    K2_EXPECT(batch.is_result(layer, mailbox.output(layer % 2)) && mailbox.posted(layer % 2) != 0);
  }
}

// Once while it is started and once on a worker; the slot works again.
void a_failure_is_the_reply(Random& random) {
  std::atomic<int> fails{0};
  House house([&](int layer, const MoeInput& input, float* output) -> std::shared_ptr<Job> {
    if (fails.load() == 1) throw ArgumentError("ids: expected few, got many");
    return compute(house.pool, layer, input, output, [&](Team&, int worker) {
      if (fails.load() == 2 && worker == 1) throw std::runtime_error("a worker broke");
    });
  });
  const Batch batch(random, 3);
  for (const char* expected : {"ids: expected few, got many", "a worker broke"}) {
    fails.fetch_add(1);
    house.post(0, 5, batch);
    K2_EXPECT(house.server->wait_reply(0, in(std::chrono::seconds(60))));
    K2_EXPECT(house.mailbox.status(0) == ReplyStatus::kFailed && house.server->failure(0) == expected);
  }
  const auto first = house.server->take_failure();
  K2_EXPECT(first && first->layer == 5 && first->reason == "ids: expected few, got many");
  K2_EXPECT(!house.server->take_failure());
  fails.store(0);
  house.post(0, 5, batch);
  house.take(0, 5, batch);
  K2_EXPECT(!house.server->take_failure());
}

void more_tokens_than_room_are_refused() {
  House house(1, 2);
  SlotLines& lines = reinterpret_cast<SlotLines*>(house.mailbox.lines_data())[0];
  lines.request.tokens = 3;
  lines.request.ticket.store(1);
  house.server->wake();
  K2_EXPECT(house.server->wait_reply(0, in(std::chrono::seconds(60))));
  K2_EXPECT(house.server->failure(0) == "mailbox: expected at most 2 tokens, got 3");
}

// Experts that take for ever, until they are cancelled: an error in time, and the slot works again.
void a_slow_computation_is_given_up(Random& random) {
  std::atomic<bool> slow{true};
  House house([&](int layer, const MoeInput& input, float* output) {
    return compute(house.pool, layer, input, output, held_by(slow));
  });
  const Batch batch(random, 2), next(random, 2), other(random, 1);
  house.post(0, 1, batch);
  K2_EXPECT(!house.server->wait_reply(0, in(milliseconds(2))));
  house.post(1, 1, other);  // behind it
  K2_EXPECT(house.server->give_up(0, in(std::chrono::seconds(60))));
  K2_EXPECT(house.mailbox.answered(0) && house.mailbox.status(0) == ReplyStatus::kGivenUp);
  slow.store(false);
  house.post(0, 2, next);
  house.take(0, 2, next);
  house.take(1, 1, other);
  K2_EXPECT(house.server->give_up(0, in(milliseconds(0))));  // nothing is in flight
}

// A server that does not come back from starting the experts: every call ends in time, and it goes on when it does.
void a_server_that_hangs_is_an_error_in_time(Random& random) {
  std::atomic<bool> hangs{true}, begun{false};
  House house([&](int layer, const MoeInput& input, float* output) {
    begun.store(true);
    while (hangs.load()) std::this_thread::sleep_for(microseconds(100));
    return compute(house.pool, layer, input, output);
  });
  const Batch batch(random, 2), next(random, 3);
  house.post(0, 1, batch);
  while (!begun.load()) std::this_thread::yield();
  for (int i = 0; i < 2; ++i) {
    K2_EXPECT(!house.server->wait_reply(0, in(milliseconds(2))));
    K2_EXPECT(!house.server->give_up(0, in(milliseconds(2))));
  }
  hangs.store(false);
  K2_EXPECT(house.server->give_up(0, in(std::chrono::seconds(60))));
  house.post(0, 2, next);
  house.take(0, 2, next);
}

void stopping_wakes_takers(Random& random) {
  const std::atomic<bool> always{true};
  for (int round = 0; round < 20; ++round) {
    House house([&](int layer, const MoeInput& input, float* output) {
      return compute(house.pool, layer, input, output, held_by(always));
    });
    const Batch batch(random, 1);
    house.post(0, 1, batch);
    if (round % 2) house.post(1, 1, batch);
    std::atomic<int> ended{0};
    std::thread taker([&] {
      try {
        K2_EXPECT(house.server->wait_reply(0, std::nullopt));
        K2_EXPECT(house.mailbox.status(0) == ReplyStatus::kGivenUp);
      } catch (const EngineError&) {
      }
      ended.fetch_add(1);
    });
    std::thread stopper([&] { house.server->stop(); });
    house.server->stop();
    taker.join();
    stopper.join();
    K2_EXPECT(ended.load() == 1);
    K2_EXPECT(house.server->give_up(0, std::nullopt));
    house.mailbox.post(0, 2, batch.input());
    K2_EXPECT(throws_engine_error([&] { house.server->wait_reply(0, std::nullopt); }));
  }
}

void a_stopped_pool_is_a_failure(Random& random) {
  House house;
  const Batch batch(random, 1);
  house.pool.stop();
  house.post(0, 1, batch);
  K2_EXPECT(house.server->wait_reply(0, in(std::chrono::seconds(60))));
  K2_EXPECT(house.mailbox.status(0) == ReplyStatus::kFailed);
  K2_EXPECT(house.server->failure(0).find("stopped") != std::string::npos);
}

// A peer that wakes nobody and sleeps on nothing, as a GPU.
void a_peer_that_only_writes_and_reads_memory_is_served(Random& random) {
  House house;
  house.server->keep_awake(true);
  for (int layer = 0; layer < 20; ++layer) {
    const Batch batch(random, 2);
    house.mailbox.post(layer % 2, layer, batch.input());
    while (!house.mailbox.answered(layer % 2)) std::this_thread::yield();
    K2_EXPECT(batch.is_result(layer, house.mailbox.output(layer % 2)));
    if (layer % 7 == 0) std::this_thread::sleep_for(milliseconds(2));
  }
}

// A GPU's posts go on behind a computation that hangs. Giving the last of them up ends that computation, too.
void a_spinning_taker_is_let_go(Random& random) {
  std::atomic<bool> hangs{true}, begun{false};
  House house([&](int layer, const MoeInput& input, float* output) {
    begun.store(true);
    return compute(house.pool, layer, input, output, held_by(hangs));
  });
  house.server->keep_awake(true);
  const Batch batch(random, 2);
  std::thread peer([&] {
    for (int layer = 0; layer < 3; ++layer) {
      house.mailbox.post(0, layer, batch.input());
      while (!house.mailbox.answered(0)) std::this_thread::yield();
      K2_EXPECT(house.mailbox.status(0) == ReplyStatus::kGivenUp);
    }
  });
  while (!begun.load()) std::this_thread::yield();
  std::atomic<bool> through{false};
  std::thread watchdog([&] { while (!through.load()) house.mailbox.release(); });
  peer.join();
  through.store(true);
  watchdog.join();
  K2_EXPECT(house.mailbox.posted(0) == 3);
  K2_EXPECT(house.server->give_up(0, in(std::chrono::seconds(10))));
  hangs.store(false);
  const Batch next(random, 3);
  house.post(0, 7, next);
  house.take(0, 7, next);
}

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

void an_idle_server_sleeps(Random& random) {
  House house;
  const Batch batch(random, 1);
  house.post(0, 1, batch);
  house.take(0, 1, batch);
  std::this_thread::sleep_for(milliseconds(5));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(100));
  K2_EXPECT(cpu_seconds() - before < 0.01);
}

// One schedule: two slots go through the layers, in an order of their own or on two threads, with delays on both sides;
// computations fail or are given up at random.
class Schedules {
 public:
  explicit Schedules(Random& random)
      : random_(random()),
        house_([this](int layer, const MoeInput& input, float* output) { return start(layer, input, output); }, 2, 1) {}

  void run() {
    const int layers = 1 + int(random_() % 4);
    std::array<int, 2> layer{};
    if (random_() % 4 == 0) {
      const uint64_t seeds[] = {random_(), random_()};
      std::thread other([&] { play(1, layers, seeds[1]); });
      play(0, layers, seeds[0]);
      other.join();
      return;
    }
    std::array<std::optional<Batch>, 2> posted;
    while (layer[0] < layers || layer[1] < layers) {
      const size_t slot = random_() % 2;
      if (layer[slot] == layers) continue;
      delay(random_);
      if (!posted[slot]) {
        posted[slot].emplace(random_, int(random_() % 4));
        house_.post(int(slot), layer[slot], *posted[slot]);
      } else {
        take(int(slot), layer[slot]++, *posted[slot], random_);
        posted[slot].reset();
      }
    }
  }

  int done() const { return done_.load(); }
  int failed() const { return failed_.load(); }
  int given_up() const { return given_up_.load(); }

 private:
  static void delay(Random& random) {
    if (random() % 12) return;
    const Clock::time_point end = Clock::now() + microseconds(random() % 200);
    random() % 4 ? std::this_thread::sleep_until(end) : std::this_thread::yield();
  }

  std::shared_ptr<Job> start(int layer, const MoeInput& input, float* output) {
    const uint64_t seed = seeds_.fetch_add(0x9e3779b97f4a7c15);
    Random random(seed);
    delay(random);
    const uint64_t fate = random() % 32;
    if (fate == 0) throw EngineError("not today");
    return compute(house_.pool, layer, input, output, [seed, fate](Team& team, int worker) {
      Random own(seed + uint64_t(worker) + 1);
      delay(own);
      if (fate == 1 && worker == 0) throw std::runtime_error("broken");
      if (fate == 2) team.sync(1);
      team.check_cancelled();
    });
  }

  void play(int slot, int layers, uint64_t seed) {
    Random random(seed);
    for (int layer = 0; layer < layers; ++layer) {
      const Batch batch(random, int(random() % 4));
      delay(random);
      house_.post(slot, layer, batch);
      delay(random);
      take(slot, layer, batch, random);
    }
  }

  void take(int slot, int layer, const Batch& batch, Random& random) {
    const bool impatient = random() % 16 == 0;
    const Deadline deadline = impatient ? in(microseconds(random() % 100)) : in(std::chrono::seconds(60));
    if (!house_.server->wait_reply(slot, deadline)) {
      K2_EXPECT(impatient);
      K2_EXPECT(house_.server->give_up(slot, in(std::chrono::seconds(60))));
      given_up_.fetch_add(1);
      return;
    }
    const ReplyStatus status = house_.mailbox.status(slot);
    if (status == ReplyStatus::kFailed) {
      const std::string& why = house_.server->failure(slot);
      K2_EXPECT(why == "not today" || why == "broken");
      failed_.fetch_add(1);
    } else {
      K2_EXPECT(status == ReplyStatus::kDone && batch.is_result(layer, house_.mailbox.output(slot)));
      done_.fetch_add(1);
    }
  }

  Random random_;
  std::atomic<uint64_t> seeds_{1};
  std::atomic<int> done_{0}, failed_{0}, given_up_{0};
  House house_;
};

void random_schedules_end_with_the_right_results(Random& random, int count) {
  Schedules schedules(random);
  for (int i = 0; i < count; ++i) schedules.run();
  K2_EXPECT(schedules.done() > 2 * count);
  if (count >= 1000) K2_EXPECT(schedules.failed() > count / 20 && schedules.given_up() > 0);
}

void a_forked_child_gets_an_error_and_ends(Random& random) {
  House house;
  const Batch batch(random, 1);
  for (int round = 0; round < 5; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(30);
      K2_EXPECT(throws_engine_error([&] { house.server->wait_reply(0, std::nullopt); }));
      K2_EXPECT(throws_engine_error([&] { house.server->give_up(0, std::nullopt); }));
      house.server->stop();
      house.server.reset();
      _exit(0);
    }
    int status = -1;
    K2_EXPECT(waitpid(child, &status, 0) == child && status == 0);
    house.post(0, round, batch);
    house.take(0, round, batch);
  }
}

}  // namespace
}  // namespace k2

int main(int argc, char** argv) {
  K2_EXPECT(argc == 3 || argc == 4);
  k2::Random random(std::stoull(argv[1]));
  k2::two_slots_give_their_results(random);
  k2::a_slot_in_flight_cannot_be_posted_to(random);
  k2::tickets_wrap(random);
  k2::a_failure_is_the_reply(random);
  k2::more_tokens_than_room_are_refused();
  k2::a_slow_computation_is_given_up(random);
  k2::a_server_that_hangs_is_an_error_in_time(random);
  k2::stopping_wakes_takers(random);
  k2::a_stopped_pool_is_a_failure(random);
  k2::a_peer_that_only_writes_and_reads_memory_is_served(random);
  k2::a_spinning_taker_is_let_go(random);
  k2::random_schedules_end_with_the_right_results(random, std::stoi(argv[2]));
  if (argc == 3) {  // what the tools cannot follow
    k2::an_idle_server_sleeps(random);
    k2::a_forked_child_gets_an_error_and_ends(random);
  }
  std::puts("ok");
}
