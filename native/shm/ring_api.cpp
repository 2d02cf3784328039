// The ring's C interface, for ctypes (communicators/message_queue/native_ring.py has the other half
// of each line).
//
// A call costs 0.2 to 0.4 us so, less than one through torch's dispatcher, and a Python function
// that must not release the interpreter's lock can say so by the way it loads the library
// (ctypes.PyDLL). Nothing here throws, takes torch types, or keeps the caller's pointers.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "prim/futex.h"
#include "shm/ring.h"

#define RING_API extern "C" __attribute__((visibility("default")))

namespace {

using shm::RingReader;
using shm::RingWriter;

RingWriter* writer(void* handle) { return static_cast<RingWriter*>(handle); }
RingReader* reader(void* handle) { return static_cast<RingReader*>(handle); }
std::byte* bytes_at(void* base) { return static_cast<std::byte*>(base); }
shm::RingHeader* header_of(void* base) { return static_cast<shm::RingHeader*>(base); }
shm::ReaderLine& line_of(void* base, uint32_t index) {
  return reinterpret_cast<shm::ReaderLine*>(bytes_at(base) + sizeof(shm::RingHeader))[index];
}

}  // namespace

RING_API uint64_t communicators_ring_bytes(uint32_t readers, uint32_t slots, uint64_t slot_bytes,
                                           uint64_t arena_bytes) {
  return shm::RingLayout(readers, slots, slot_bytes, arena_bytes).region_bytes;
}

RING_API void communicators_ring_create(void* base, uint32_t readers, uint32_t slots,
                                        uint64_t slot_bytes, uint64_t arena_bytes,
                                        const unsigned char* id, uint32_t first_message) {
  shm::ring_create(bytes_at(base), readers, slots, slot_bytes, arena_bytes, id, first_message);
}

RING_API int communicators_ring_check(const void* base, const unsigned char* id) {
  return static_cast<int>(shm::ring_check(static_cast<const std::byte*>(base), id));
}

// state, pid and start time of a reader; `consumed`: messages modulo 2^31.
RING_API void communicators_ring_reader_info(void* base, uint32_t index, uint64_t out[4]) {
  const shm::ReaderLine& line = line_of(base, index);
  out[0] = line.state.load(std::memory_order_acquire);
  out[1] = line.pid.load(std::memory_order_acquire);
  out[2] = line.start_time.load(std::memory_order_acquire);
  out[3] = line.consumed.load(std::memory_order_acquire) >> 1;
}

// 0: published (doubled, bit 0 is closed), 1: joined, 2: ready.
RING_API uint32_t communicators_ring_word(void* base, int which) {
  auto* header = header_of(base);
  auto& word = which == 0 ? header->published : which == 1 ? header->joined : header->ready;
  return word.load(std::memory_order_acquire);
}

// Bytes that a slot holds, of a caller's limit.
RING_API uint64_t communicators_ring_slot_bytes(uint64_t chunk_bytes) {
  return std::min(chunk_bytes, shm::kMostSlotBytes);
}

// Where what a slot holds begins in the region, and how many bytes may lie there.
RING_API void communicators_ring_slot_data(void* base, uint64_t slot, uint64_t out[2]) {
  const auto* header = header_of(base);
  const uint64_t at = header->slots_offset + slot * header->slot_stride;
  const auto& held = *reinterpret_cast<const shm::SlotHeader*>(bytes_at(base) + at);
  const bool in_block = held.kind == shm::SlotKind::kRawBlock;
  out[0] = in_block ? held.block + shm::kBlockHeaderBytes : at + shm::kSlotHeaderBytes;
  out[1] = in_block ? held.bytes : header->slot_bytes;
}

RING_API void communicators_ring_set_ready(void* base) {
  prim::store_release(header_of(base)->ready, 1u);
  prim::futex_wake(header_of(base)->ready);
}

// Sleeps while word 1 or 2 is `seen`.
RING_API void communicators_ring_wait_word(void* base, int which, uint32_t seen,
                                           int64_t timeout_ns) {
  auto* header = header_of(base);
  (void)prim::futex_wait(which == 1 ? header->joined : header->ready, seen, timeout_ns);
}

RING_API void communicators_ring_copy(void* to, const void* from, uint64_t bytes) {
  std::memcpy(to, from, bytes);
}

// --- the writer ---------------------------------------------------------------------------------

RING_API void* communicators_ring_writer_open(void* base, int fd, uint64_t unread_limit,
                                              int64_t least_spin_ns, int64_t most_spin_ns) {
  return new (std::nothrow)
      RingWriter(bytes_at(base), fd, unread_limit, shm::SpinBudget(least_spin_ns, most_spin_ns));
}

RING_API void communicators_ring_writer_free(void* handle) { delete writer(handle); }

// 1 if the message was published, 0 if every slot is taken. Called without a prototype (faster by
// 0.1 us), hence the int.
RING_API int communicators_ring_try_write(void* handle, const char* data, int bytes) {
  RingWriter* ring = writer(handle);
  if (!ring->has_slot_soon()) return 0;
  std::memcpy(ring->slot_payload(), data, static_cast<size_t>(bytes));
  ring->publish(shm::SlotKind::kInline, static_cast<uint64_t>(bytes));
  return 1;
}

RING_API int communicators_ring_has_slot(void* handle) { return writer(handle)->has_slot(); }

RING_API void* communicators_ring_slot_payload(void* handle) {
  return writer(handle)->slot_payload();
}

RING_API void communicators_ring_publish(void* handle, uint32_t kind, uint64_t bytes,
                                         uint64_t block) {
  writer(handle)->publish(static_cast<shm::SlotKind>(kind), bytes, block);
}

RING_API int64_t communicators_ring_allocate_block(void* handle, uint64_t bytes,
                                                   int in_slot_count) {
  return writer(handle)->allocate_block(bytes, in_slot_count != 0);
}

RING_API void communicators_ring_free_block(void* handle, uint64_t block) {
  writer(handle)->free_block(block);
}

RING_API int communicators_ring_writer_wait(void* handle, int64_t timeout_ns, int again) {
  return static_cast<int>(writer(handle)->wait(timeout_ns, again != 0));
}

RING_API void communicators_ring_nudge(void* handle) { writer(handle)->nudge(); }

// Where `sleepers` lies in the region: a hint for whether to nudge.
RING_API uint64_t communicators_ring_sleepers_offset() {
  return offsetof(shm::RingHeader, sleepers);
}

RING_API void communicators_ring_drop(void* handle, uint32_t index) { writer(handle)->drop(index); }

RING_API void communicators_ring_close(void* handle) { writer(handle)->close(); }

RING_API uint64_t communicators_ring_sent(void* handle) { return writer(handle)->sent(); }

RING_API uint64_t communicators_ring_backed_bytes(void* handle) {
  return writer(handle)->backed_bytes();
}

// --- a reader -----------------------------------------------------------------------------------

RING_API void* communicators_ring_reader_open(void* base, uint32_t index, int64_t least_spin_ns,
                                              int64_t most_spin_ns) {
  return new (std::nothrow)
      RingReader(bytes_at(base), index, shm::SpinBudget(least_spin_ns, most_spin_ns));
}

RING_API void communicators_ring_reader_free(void* handle) { delete reader(handle); }

RING_API int communicators_ring_join(void* handle, uint32_t pid, uint64_t start_time) {
  return reader(handle)->join(pid, start_time);
}

RING_API void communicators_ring_leave(void* handle) { reader(handle)->leave(); }

// The structure that take() fills.
RING_API const void* communicators_ring_taken(void* handle) { return reader(handle)->taken(); }

// Messages copied out; -1: one that lies where it is, see taken(); 0: none.
RING_API int communicators_ring_take(void* handle) {
  RingReader* ring = reader(handle);
  if (!ring->take_soon()) return 0;
  return ring->taken()->copied > 0 ? static_cast<int>(ring->taken()->copied) : -1;
}

RING_API void communicators_ring_done(void* handle) { reader(handle)->done(); }

RING_API int communicators_ring_reader_wait(void* handle, int64_t timeout_ns, int again,
                                            int writer_pidfd) {
  return static_cast<int>(reader(handle)->wait(timeout_ns, again != 0, writer_pidfd));
}

// By the region's address: a view may be released after its reader was closed.
RING_API void communicators_ring_release_block(void* base, uint32_t index, uint64_t block) {
  shm::ring_release_block(bytes_at(base), index, block);
}

RING_API uint64_t communicators_ring_received(void* handle) { return reader(handle)->received(); }

RING_API void communicators_ring_cancel_writer(void* handle) {
  writer(handle)->cancel();
  // Only this process is meant; whoever else is woken looks again and goes back to sleep.
  prim::futex_wake(writer(handle)->wait_word());
}

RING_API void communicators_ring_cancel_reader(void* handle) {
  reader(handle)->cancel();
  prim::futex_wake(reader(handle)->wait_word());
}
