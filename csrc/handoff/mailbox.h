// The host memory through which an accelerator hands batches to the routed experts, and gets the results: two slots, and
// a protocol that a GPU's kernels can speak as well as a thread.
//
// A slot has two lines of flags and a payload:
//
//   offset  written by the accelerator          offset  written by the host
//        0  request ticket, uint32                 128  reply ticket, uint32: the low half of one 64-bit word
//        4  layer, uint32                          132  status, uint32: 0 done, 1 failed, 2 given up
//        8  tokens, uint32
//       12  1 if hidden is bf16, 0 if fp32
//   payload: hidden [tokens, H], ids int32 [tokens, K], weights fp32 [tokens, K]; output fp32 [tokens, H]
//
// Tickets. A slot's ticket begins at 0, and each request takes the next one, leaving out 0 when it wraps. The slot is free
// while the reply ticket equals the request ticket. Both sides compare tickets for equality alone.
//
// POST, by the accelerator, in a free slot whose output it has read:
//   1. write hidden, ids, weights, layer, tokens and the form of hidden, with plain stores
//   2. release at system scope (GPU: __threadfence_system by each thread that wrote, then a barrier)
//   3. store the next ticket into the request ticket. One thread does it; the last ticket is known on its side.
// SERVE, by the host:
//   4. acquire-load the request ticket until it differs from the last one that was served
//   5. compute from the payload in place: it is read until the computation ends, and `output` is written
//   6. release-store {ticket, status} into the reply word. `output` holds the result if the status is 0.
// TAKE, by the accelerator:
//   7. acquire-load the reply ticket at system scope until it equals the ticket of its request
//   8. read status and output, not through a cache that steps 5 and 6 do not reach
//
// Why this is enough. 2 and 3 release what 4 acquires, so the computation sees all of the payload; 6 releases what 7
// acquires, so the taker sees all of the output. Inside the host the workers' writes are ordered before 6 by the
// completion of their job. The payload of a request is overwritten by the next POST, which comes behind 7 and so behind
// the last read of it; the output is overwritten by the next 5, behind 4 and 3 and so behind the last read of it (8 comes
// before the next POST on the accelerator's side). So no byte is written while the other side may touch it, with no lock
// and no third flag.
//
// Late replies. A reply names the ticket that it answers, so that the reply of a request that was given up is never taken
// for that of a later one. To give a request up, its ticket is given to the server (`ExpertServer::give_up`): the
// server cancels the computation, waits for it to end and answers with status 2. Only then is the slot free, for the
// computation still reads and writes the payload. So a failed step leaves nothing behind, and no epoch is needed.
//
// A taker that cannot give up by itself (a kernel that spins) is let go by the host: `release` answers what is unanswered
// with status 2, again and again until the accelerator has run through its step. The results of that step are void: a
// released slot may be posted to while its old computation goes on, which mixes numbers but stays inside the payload.
// Before the next step the host waits until the server has nothing in flight.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "core/huge_buffer.h"
#include "moe/moe_job.h"

namespace k2 {

constexpr int kMailboxSlots = 2;

enum class ReplyStatus : uint32_t { kDone = 0, kFailed = 1, kGivenUp = 2 };

struct SlotLines {
  struct alignas(128) Request {
    std::atomic<uint32_t> ticket;
    uint32_t layer, tokens, bf16;
  } request;
  struct alignas(128) Reply {
    std::atomic<uint64_t> word;
  } reply;
};
static_assert(sizeof(SlotLines) == 256 && offsetof(SlotLines, reply) == 128);
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

class Mailbox {
 public:
  // One slot's payload. The areas are 128-byte aligned.
  struct Payload {
    explicit Payload(int tokens = 0, int hidden = 0, int per_token = 0);

    int tokens;  // room
    HugeBuffer memory;
    uint8_t* hidden;  // room for fp32
    int32_t* ids;
    float* weights;
    float* output;
  };

  // A request as the host reads it. The memory is the payload's.
  struct Request {
    uint32_t ticket;
    int layer;
    MoeInput input;
    float* output;
  };

  // With room for `tokens` in each slot; memory that is not used is not taken.
  Mailbox(int hidden, int per_token, int tokens);

  const int hidden, per_token;

  // The accelerator's side, as a thread speaks it; one thread at a time for each slot. `post` makes room for the batch.
  void post(int slot, int layer, const MoeInput& input);
  // Steps 2 and 3 of it alone, for a payload that was written in another way. ArgumentError unless the slot is free.
  void raise_request(int slot, int layer, int tokens, bool bf16);
  bool answered(int slot) const { return ticket_of(reply_word(slot)) == posted(slot); }
  ReplyStatus status(int slot) const { return ReplyStatus(reply_word(slot) >> 32); }
  // Behind the reply.
  const float* output(int slot) const { return payload(slot).output; }

  uint32_t posted(int slot) const { return lines(slot).request.ticket.load(); }
  int posted_layer(int slot) const { return int(lines(slot).request.layer); }
  int posted_tokens(int slot) const { return int(lines(slot).request.tokens); }

  // The host's side: what is requested, if it is not what was `served` last.
  std::optional<Request> request(int slot, uint32_t served) const;
  void reply(int slot, uint32_t ticket, ReplyStatus status);
  // Lets go of takers: answers what is unanswered as given up.
  void release();

  // The memory, for an accelerator that maps it.
  uint8_t* lines_data() const { return lines_.data(); }
  size_t lines_bytes() const { return lines_.bytes(); }
  const Payload& payload(int slot) const { return payloads_[size_t(slot)]; }

 private:
  static uint32_t ticket_of(uint64_t word) { return uint32_t(word); }
  uint64_t reply_word(int slot) const { return lines(slot).reply.word.load(); }
  SlotLines& lines(int slot) const;
  void check_free(int slot) const;

  HugeBuffer lines_;
  std::array<Payload, kMailboxSlots> payloads_;
};

}  // namespace k2
