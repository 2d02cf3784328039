// The ring under load, as threads of one process, for ThreadSanitizer and AddressSanitizer: one
// writer, readers that keep up, a reader that leaves half-way. Exits with 0 if every message was
// read once, in order and whole. Compiled and run by test_ring_sanitizers.py.
//
//   ring_stress MESSAGES FIRST    FIRST: number of the first message, to pass the counters' wrap
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "shm/ring.h"

namespace {

constexpr uint32_t kReaders = 3;
constexpr uint32_t kSlots = 4;
constexpr uint64_t kChunk = 192;
constexpr uint64_t kArena = 1 << 20;
constexpr int64_t kSliceNs = 50'000'000;

[[noreturn]] void fail(const char* what, uint64_t message, uint64_t seen) {
  std::fprintf(stderr, "%s: message %llu, seen %llu\n", what,
               static_cast<unsigned long long>(message), static_cast<unsigned long long>(seen));
  std::exit(1);
}

// Every seventh message lies in a block, every eleventh is raw.
shm::SlotKind kind_of(uint64_t i) {
  return i % 7 == 0    ? shm::SlotKind::kBlock
         : i % 11 == 0 ? shm::SlotKind::kRaw
                       : shm::SlotKind::kInline;
}
uint64_t bytes_of(uint64_t i) {
  return kind_of(i) == shm::SlotKind::kBlock ? 8 * (1 + i % 4000) : 8 * (1 + i % (kChunk / 8));
}

void fill(std::byte* to, uint64_t bytes, uint64_t i) {
  for (uint64_t at = 0; at < bytes; at += 8) {
    const uint64_t word = i * 31 + at;
    std::memcpy(to + at, &word, 8);
  }
}

void check(const std::byte* from, uint64_t bytes, uint64_t i) {
  if (bytes != bytes_of(i)) fail("length", i, bytes);
  for (uint64_t at = 0; at < bytes; at += 8) {
    uint64_t word;
    std::memcpy(&word, from + at, 8);
    if (word != i * 31 + at) fail("content", i, word);
  }
}

void wait(shm::RingWriter& ring) {
  for (bool again = false; ring.wait(kSliceNs, again) != shm::WaitResult::kReady;) again = true;
}

void run_writer(std::byte* base, uint64_t messages) {
  // The limit on unread blocks is small, so that the writer waits for them, too.
  shm::RingWriter ring(base, -1, 40'000, shm::SpinBudget(1000, 20'000));
  for (uint64_t i = 0; i < messages; ++i) {
    if (i % 3 == 0) ring.nudge();
    while (!ring.has_slot()) wait(ring);
    const uint64_t bytes = bytes_of(i);
    if (kind_of(i) == shm::SlotKind::kBlock) {
      int64_t block;
      while ((block = ring.allocate_block(shm::kBlockHeaderBytes + bytes)) == ring.kMustWait) {
        wait(ring);
      }
      if (block < 0) fail("no block", i, static_cast<uint64_t>(-block));
      fill(base + block + shm::kBlockHeaderBytes, bytes, i);
      ring.publish(shm::SlotKind::kBlock, shm::kBlockHeaderBytes + bytes,
                   static_cast<uint64_t>(block));
    } else {
      fill(ring.slot_payload(), bytes, i);
      ring.publish(kind_of(i), bytes);
    }
  }
  ring.close();
}

void run_reader(std::byte* base, uint32_t index, uint64_t messages) {
  auto ring = std::make_unique<shm::RingReader>(base, index, shm::SpinBudget(1000, 20'000));
  if (!ring->join(1000 + index, 1)) fail("join", 0, index);
  uint64_t held[2] = {0, 0};  // blocks are released late, like views
  uint64_t next = 0;
  for (bool again = false; next < messages;) {
    if (!ring->take()) {
      const auto result = ring->wait(kSliceNs, again, shm::kNobody);
      if (result == shm::WaitResult::kClosed) fail("closed early", next, index);
      again = result != shm::WaitResult::kReady;
      continue;
    }
    again = false;
    const auto& taken = *ring->taken();
    uint32_t begin = 0;
    for (uint32_t i = 0; i < taken.copied; ++i, ++next) {
      check(taken.bytes + begin, taken.ends[i] - begin, next);
      begin = taken.ends[i];
    }
    if (taken.copied > 0) continue;
    if (taken.kind != kind_of(next)) fail("kind", next, static_cast<uint64_t>(taken.kind));
    if (taken.kind == shm::SlotKind::kBlock) {
      const uint64_t block = taken.offset;
      check(base + block + shm::kBlockHeaderBytes, taken.size - shm::kBlockHeaderBytes, next);
      ring->done();
      if (held[0] != 0) shm::ring_release_block(base, index, held[0]);
      held[0] = held[1];
      held[1] = block;
    } else {
      check(base + taken.offset, taken.size, next);
      ring->done();
    }
    ++next;
  }
  for (uint64_t block : held) {
    if (block != 0) shm::ring_release_block(base, index, block);
  }
  ring->leave();
}

}  // namespace

int main(int, char** arguments) {
  const uint64_t messages = std::strtoull(arguments[1], nullptr, 10);
  const auto first = static_cast<uint32_t>(std::strtoul(arguments[2], nullptr, 10));
  const shm::RingLayout layout(kReaders, kSlots, kChunk, kArena);
  std::byte* base = static_cast<std::byte*>(std::aligned_alloc(4096, layout.region_bytes));
  std::memset(base, 0, layout.region_bytes);
  const unsigned char id[16] = {7};
  shm::ring_create(base, kReaders, kSlots, kChunk, kArena, id, first);
  if (shm::ring_check(base, id) != shm::RingCheck::kSame) fail("check", 0, 0);
  std::vector<std::thread> threads;
  for (uint32_t reader = 0; reader < kReaders; ++reader) {
    const uint64_t stays_for = reader == 2 ? messages / 2 : messages;
    threads.emplace_back(run_reader, base, reader, stays_for);
  }
  threads.emplace_back(run_writer, base, messages);
  for (auto& thread : threads) thread.join();
  std::free(base);
  std::puts("all read");
  return 0;
}
