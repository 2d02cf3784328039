#include "shm/channel.h"

#include <algorithm>
#include <cstring>

namespace shm {
namespace {

// Precedes the bytes of a message in the ring.
struct Header {
  uint64_t bytes;
  uint32_t dtype;
  uint32_t reserved;
};

// One end of a ring. `count` is this end's own counter, which it alone writes.
struct End {
  Team& team;
  Channel& channel;
  std::byte* ring;
  size_t capacity;
  int peer;
  bool sends;
  uint32_t count;

  End(Team& t, int from, int to)
      : team(t),
        channel(t.channel(from, to)),
        ring(t.ring(from, to)),
        capacity(t.layout().ring_bytes),
        peer(from == t.rank() ? to : from),
        sends(from == t.rank()),
        count(prim::load_relaxed(sends ? channel.head : channel.tail)) {}

  // Waits until at least one byte can be put or taken, and says how many, at most `most`, without
  // wrapping.
  size_t available(size_t most) {
    const prim::AtomicU32& theirs = sends ? channel.tail : channel.head;
    const uint32_t expected = sends ? count - static_cast<uint32_t>(capacity) + 1 : count + 1;
    if (!prim::reached(prim::load_acquire(theirs), expected)) {
      // Nothing more comes until the peer sees what is there.
      show();
      team.wait_word(theirs, sends ? channel.tail_sleeps : channel.head_sleeps, expected, peer,
                     sends ? Team::kBytesTaken : Team::kBytesSent);
    }
    const uint32_t used =
        sends ? count - prim::load_acquire(theirs) : prim::load_acquire(theirs) - count;
    const size_t room = sends ? capacity - used : used;
    return std::min({room, most, capacity - count % capacity});
  }

  // Tells the peer how far this end is.
  void show() {
    prim::AtomicU32& mine = sends ? channel.head : channel.tail;
    if (prim::load_relaxed(mine) == count) return;
    mine.store(count, std::memory_order_seq_cst);
    const prim::AtomicU32& sleeps = sends ? channel.head_sleeps : channel.tail_sleeps;
    if (sleeps.load(std::memory_order_seq_cst) != 0) Team::wake(mine);
  }

  // copy(position in ring, done so far, bytes), until `bytes` are moved. The peer is shown what is
  // done at every quarter of the ring, so that both ends work at once.
  template <typename Copy>
  void move(size_t bytes, Copy copy) {
    for (size_t done = 0; done < bytes;) {
      const size_t n = available(std::min(bytes - done, std::max<size_t>(capacity / 4, 64)));
      copy(ring + count % capacity, done, n);
      done += n;
      count += static_cast<uint32_t>(n);
      if (done < bytes) show();
    }
  }
  // Copies the next bytes and leaves them in the ring. Not by move(), which shows the sender what
  // was taken so far where a header wraps or comes in two pieces.
  void peek(void* data, size_t bytes) {
    const uint32_t expected = count + static_cast<uint32_t>(bytes);
    if (!prim::reached(prim::load_acquire(channel.head), expected)) {
      team.wait_word(channel.head, channel.head_sleeps, expected, peer, Team::kBytesSent);
    }
    const size_t first = std::min(bytes, capacity - count % capacity);
    std::memcpy(data, ring + count % capacity, first);
    std::memcpy(static_cast<std::byte*>(data) + first, ring, bytes - first);
  }
  void put(const void* data, size_t bytes) {
    move(bytes, [&](std::byte* at, size_t done, size_t n) {
      std::memcpy(at, static_cast<const std::byte*>(data) + done, n);
    });
  }
  void take(void* data, size_t bytes) {
    move(bytes, [&](const std::byte* at, size_t done, size_t n) {
      std::memcpy(static_cast<std::byte*>(data) + done, at, n);
    });
  }
};

}  // namespace

void send(Team& team, DType dtype, const void* data, size_t bytes, int to) {
  const Call call(team, {Op::kSend, dtype, to, bytes});
  End end(team, team.rank(), to);
  const Header header{bytes, static_cast<uint32_t>(dtype), 0};
  end.put(&header, sizeof header);
  end.put(data, bytes);
  end.show();
}

size_t next_message_bytes(Team& team, int from) {
  const Call call(team, {Op::kRecv, DType::kUInt8, from, 0});
  End end(team, from, team.rank());
  Header header;
  end.peek(&header, sizeof header);
  return header.bytes;
}

void recv(Team& team, DType dtype, void* data, size_t bytes, int from) {
  const Call call(team, {Op::kRecv, dtype, from, bytes});
  End end(team, from, team.rank());
  Header header;
  end.take(&header, sizeof header);
  if (header.bytes != bytes || header.dtype != static_cast<uint32_t>(dtype)) {
    team.throw_mismatch(
        from,
        Signature{Op::kSend, static_cast<DType>(header.dtype), team.rank(), header.bytes}.packed());
  }
  end.take(data, bytes);
  end.show();
}

}  // namespace shm
