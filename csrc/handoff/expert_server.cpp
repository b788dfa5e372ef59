#include "handoff/expert_server.h"

#include <pthread.h>

#include <algorithm>
#include <exception>
#include <system_error>
#include <utility>

#include "core/error.h"
#include "cpu/affinity.h"
#include "cpu/blocked_signals.h"

namespace k2 {
namespace {

constexpr std::chrono::microseconds kSpin{50};
constexpr std::chrono::microseconds kNap{50};     // how late a GPU's request may be noticed without CPUs to spin on
constexpr std::chrono::microseconds kBeside{200};  // a request while the experts compute, likewise: they are busy
constexpr size_t kMaxTimes = 1 << 20;

int64_t now_ns() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

// Of the exception that is being handled.
std::string reason() {
  try {
    throw;
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an unknown exception";
  }
}

}  // namespace

ExpertServer::ExpertServer(ThreadPool& pool, Mailbox& mailbox, Start start)
    : pool_(pool), mailbox_(mailbox), start_(std::move(start)) {
  for (int slot = 0; slot < kMailboxSlots; ++slot) slots_[size_t(slot)].served.store(mailbox.posted(slot));
  // The workers, this thread and the one that posts: a spinning thread must not keep another one from running.
  spin_ = pool.workers() + 2 <= allowed_cpus() ? kSpin : std::chrono::microseconds{0};
  const BlockedSignals blocked;
  try {
    thread_ = std::thread([this] { serve(); });
  } catch (const std::system_error& error) {
    throw EngineError(text("expert server: expected to start a thread, got ", error.what()));
  }
  pthread_setname_np(thread_.native_handle(), "k2-server");
}

void ExpertServer::keep_awake(bool awake) {
  awake_.store(awake);
  wake();
}

bool ExpertServer::wait_reply(int slot, Deadline deadline) {
  pool_.check_process();
  const bool changed = replies_.wait([&] { return mailbox_.answered(slot) || stopped_.load(); }, spin_, deadline);
  if (changed && !mailbox_.answered(slot)) throw EngineError("expert server: expected it running, got a stopped one");
  return changed;
}

bool ExpertServer::give_up(int slot, Deadline deadline) {
  pool_.check_process();
  Slot& s = slots_[size_t(slot)];
  const uint32_t ticket = mailbox_.posted(slot);
  s.given_up.store(ticket);
  wake();
  return replies_.wait([&] { return s.served.load() == ticket || stopped_.load(); }, spin_, deadline);
}

std::vector<ExpertServer::JobTime> ExpertServer::take_times() {
  const std::lock_guard lock(record_mutex_);
  return std::exchange(times_, {});
}

std::optional<ExpertServer::Failure> ExpertServer::take_failure() {
  const std::lock_guard lock(record_mutex_);
  return std::exchange(first_failure_, std::nullopt);
}

void ExpertServer::stop() {
  if (pool_.forked()) return;
  stopping_.store(true);
  wake();
  const std::lock_guard one_at_a_time(join_mutex_);
  if (thread_.joinable()) thread_.join();
  start_ = nullptr;  // lets go of the experts
}

void ExpertServer::serve() {
  Clock::time_point moved = Clock::now();
  for (;;) {
    bool moves = false;
    for (int slot = 0; slot < kMailboxSlots; ++slot) moves |= advance(slot);
    if (moves) {
      moved = Clock::now();
    } else if (stopping_.load() && !next_to_end()) {
      break;
    } else {
      rest(moved);
    }
  }
  stopped_.store(true);
  replies_.notify();
}

// Takes a slot one step further; false if there was nothing to do.
bool ExpertServer::advance(int slot) {
  Slot& s = slots_[size_t(slot)];
  if (!s.job) return begin(slot);
  if (unwanted(slot)) s.job->cancel();
  if (!s.job->done()) return false;
  end(s, slot);
  return true;
}

bool ExpertServer::begin(int slot) {
  Slot& s = slots_[size_t(slot)];
  const std::optional<Mailbox::Request> request = mailbox_.request(slot, s.served.load());
  if (!request) return false;
  s.ticket = request->ticket;
  if (unwanted(slot)) {
    answer(s, slot, ReplyStatus::kGivenUp);
    return true;
  }
  const int tokens = request->input.tokens, room = mailbox_.payload(slot).tokens;
  s.time = {request->layer, slot, tokens, now_ns(), 0};
  try {
    check_argument(tokens >= 0 && tokens <= room, "mailbox", text("at most ", room, " tokens"), uint32_t(tokens));
    s.job = start_(request->layer, request->input, request->output);
    s.order = ++started_;
  } catch (...) {
    fail(s);
    answer(s, slot, ReplyStatus::kFailed);
  }
  return true;
}

void ExpertServer::end(Slot& s, int slot) {
  s.time.start = std::max(s.time.start, last_stop_);  // jobs run one after the other
  s.time.stop = last_stop_ = now_ns();
  record(s.time);
  ReplyStatus status = ReplyStatus::kDone;
  try {
    s.job->rethrow();
  } catch (...) {
    status = unwanted(slot) ? ReplyStatus::kGivenUp : ReplyStatus::kFailed;
    if (status == ReplyStatus::kFailed) fail(s);
  }
  s.job.reset();
  answer(s, slot, status);
}

void ExpertServer::answer(Slot& s, int slot, ReplyStatus status) {
  mailbox_.reply(slot, s.ticket, status);
  s.served.store(s.ticket);
  replies_.notify();
}

// Keeps the reason: the exception that is being handled.
void ExpertServer::fail(Slot& s) {
  s.failure = reason();
  const std::lock_guard lock(record_mutex_);
  if (!first_failure_) first_failure_ = Failure{s.time.layer, s.failure};
}

void ExpertServer::record(JobTime time) {
  if (!keeps_times_.load()) return;
  const std::lock_guard lock(record_mutex_);
  if (times_.size() < kMaxTimes) times_.push_back(time);
}

// Waits for a moment, or for something to do.
void ExpertServer::rest(Clock::time_point moved) {
  if (Clock::now() < moved + spin_) return relax_cpu();
  if (const Job* job = next_to_end()) {
    pool_.wait(*job, Clock::now() + kBeside);
    return;
  }
  Deadline deadline;
  if (awake_.load()) {
    if (spin_.count() > 0) return relax_cpu();
    deadline = Clock::now() + kNap;
  }
  const auto ready = [&] { return something_to_do() || (!deadline && awake_.load()); };
  requests_.wait(ready, std::chrono::nanoseconds{0}, deadline);
}

bool ExpertServer::something_to_do() const {
  if (stopping_.load()) return true;
  for (int slot = 0; slot < kMailboxSlots; ++slot) {
    if (mailbox_.posted(slot) != slots_[size_t(slot)].served.load()) return true;
  }
  return false;
}

// Of the jobs in flight the one that was started first; null if there is none.
const Job* ExpertServer::next_to_end() const {
  const Slot* first = nullptr;
  for (const Slot& slot : slots_) {
    if (slot.job && (!first || slot.order < first->order)) first = &slot;
  }
  return first ? first->job.get() : nullptr;
}

}  // namespace k2
