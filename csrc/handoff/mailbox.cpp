#include "handoff/mailbox.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "core/error.h"

namespace k2 {
namespace {

constexpr size_t kLine = 128;

size_t padded(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

Mailbox::Payload::Payload(int tokens, int hidden, int per_token) : tokens(tokens) {
  const size_t rows = padded(size_t(tokens) * size_t(hidden) * sizeof(float));
  const size_t choices = padded(size_t(tokens) * size_t(per_token) * sizeof(float));
  memory = HugeBuffer(2 * rows + 2 * choices);
  this->hidden = memory.data();
  ids = reinterpret_cast<int32_t*>(memory.data() + rows);
  weights = reinterpret_cast<float*>(memory.data() + rows + choices);
  output = reinterpret_cast<float*>(memory.data() + rows + 2 * choices);
}

Mailbox::Mailbox(int hidden, int per_token, int tokens)
    : hidden(hidden), per_token(per_token), lines_(kMailboxSlots * sizeof(SlotLines)) {
  for (Payload& payload : payloads_) payload = Payload(tokens, hidden, per_token);
  for (int slot = 0; slot < kMailboxSlots; ++slot) new (lines_.data() + size_t(slot) * sizeof(SlotLines)) SlotLines{};
}

SlotLines& Mailbox::lines(int slot) const {
  return *std::launder(reinterpret_cast<SlotLines*>(lines_.data() + size_t(slot) * sizeof(SlotLines)));
}

void Mailbox::check_free(int slot) const {
  if (!answered(slot)) check_argument(false, "slot", "a free one", text("slot ", slot, ", which is in flight"));
}

void Mailbox::post(int slot, int layer, const MoeInput& input) {
  check_free(slot);
  Payload& payload = payloads_[size_t(slot)];
  if (input.tokens > payload.tokens) payload = Payload(std::max(input.tokens, 2 * payload.tokens), hidden, per_token);
  const size_t rows = size_t(input.tokens) * size_t(hidden), choices = size_t(input.tokens) * size_t(per_token);
  if (input.tokens > 0) {
    std::memcpy(payload.hidden, input.hidden, rows * (input.bf16 ? 2 : 4));
    std::memcpy(payload.ids, input.ids, choices * sizeof(int32_t));
    std::memcpy(payload.weights, input.weights, choices * sizeof(float));
  }
  raise_request(slot, layer, input.tokens, input.bf16);
}

void Mailbox::raise_request(int slot, int layer, int tokens, bool bf16) {
  check_free(slot);
  SlotLines::Request& request = lines(slot).request;
  request.layer = uint32_t(layer);
  request.tokens = uint32_t(tokens);
  request.bf16 = bf16;
  const uint32_t next = request.ticket.load() + 1;
  request.ticket.store(next == 0 ? 1 : next);
}

std::optional<Mailbox::Request> Mailbox::request(int slot, uint32_t served) const {
  const SlotLines::Request& request = lines(slot).request;
  const uint32_t ticket = request.ticket.load();
  if (ticket == served) return std::nullopt;
  const Payload& p = payload(slot);
  const MoeInput input{p.hidden, request.bf16 != 0, p.ids, p.weights, int(request.tokens)};
  return Request{ticket, int(request.layer), input, p.output};
}

void Mailbox::reply(int slot, uint32_t ticket, ReplyStatus status) {
  lines(slot).reply.word.store(uint64_t(status) << 32 | ticket);
}

void Mailbox::release() {
  for (int slot = 0; slot < kMailboxSlots; ++slot) {
    if (const uint32_t ticket = posted(slot); !answered(slot)) reply(slot, ticket, ReplyStatus::kGivenUp);
  }
}

}  // namespace k2
