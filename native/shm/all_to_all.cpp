// all_to_all: every rank has a part for every other.
//
// How long the parts are is known to the two ranks that exchange them alone, and the number of
// steps must be the same on all. So in its first step a rank puts what it sends to and expects from
// each rank into its slot, and behind that the parts themselves, if they are short together. From
// all the slots every rank then knows whether everything fits, and how many more steps the long
// parts take; those go in chunks, a slot holding one of each other rank.
#include <numeric>

#include "prim/text.h"
#include "shm/collectives.h"
#include "shm/pipeline.h"

namespace shm {
namespace {

size_t whole_lines(size_t bytes) { return prim::round_up(bytes, prim::kLineBytes); }

// What one rank has written first: the bytes to each rank, then those from each.
struct Sizes {
  const uint64_t* to;
  const uint64_t* from;
};

struct AllToAll {
  Team& team;
  const std::byte* const inp;
  std::byte* const out;
  const Sizes mine;
  const int w = team.world_size();
  const int rank = team.rank();
  const size_t header = whole_lines(2 * sizeof(uint64_t) * static_cast<size_t>(w));
  bool fitted[kMaxRanks] = {};  // all that a rank sends, in its first slot

  size_t offset(const uint64_t* sizes, int part) const {
    return std::accumulate(sizes, sizes + part, size_t{0});
  }
  const std::byte* part_for(int q) const { return inp + offset(mine.to, q); }
  std::byte* part_from(int p) const { return out + offset(mine.from, p); }

  Sizes sizes_of(int p, const std::byte* slot) const {
    if (p == rank) return mine;
    const auto* words = reinterpret_cast<const uint64_t*>(slot);
    return {words, words + w};
  }

  // Where in p's first slot the part of q lies; q = w: where the last one ends.
  size_t place(const Sizes& sizes, int p, int q) const {
    size_t at = header;
    for (int other = 0; other < q; ++other) at += other == p ? 0 : whole_lines(sizes.to[other]);
    return at;
  }
  bool fits(const Sizes& sizes, int p, const Lane& lane) const {
    return place(sizes, p, w) <= std::min(header + team.tuning().one_shot_bytes, lane.slot_bytes());
  }

  // Returns the longest part that is still to be moved.
  size_t first_step() {
    Lane& lane = team.lane();
    const uint32_t epoch = lane.next_step();
    std::byte* slot = lane.my_slot(epoch);
    std::memcpy(slot, mine.to, sizeof(uint64_t) * static_cast<size_t>(w));
    std::memcpy(slot + sizeof(uint64_t) * static_cast<size_t>(w), mine.from,
                sizeof(uint64_t) * static_cast<size_t>(w));
    if (fits(mine, rank, lane)) {
      for (int q = 0; q < w; ++q) {
        if (q != rank) std::memcpy(slot + place(mine, rank, q), part_for(q), mine.to[q]);
      }
    }
    lane.publish(epoch);
    lane.wait_all(epoch);
    check(lane, epoch);
    std::memcpy(part_from(rank), part_for(rank), mine.to[rank]);  // while nobody waits
    size_t longest = 0;
    for (int i = 0; i < w; ++i) {
      const int p = (rank + i) % w;  // not all from the same rank at once
      const Sizes theirs = sizes_of(p, lane.slot(p, epoch));
      fitted[p] = fits(theirs, p, lane);
      if (!fitted[p]) {
        for (int q = 0; q < w; ++q) longest = std::max<size_t>(longest, q == p ? 0 : theirs.to[q]);
      } else if (p != rank) {
        std::memcpy(part_from(p), lane.slot(p, epoch) + place(theirs, p, rank), theirs.to[rank]);
      }
    }
    return longest;
  }

  // Every rank looks at all of them, so all raise the same.
  void check(const Lane& lane, uint32_t epoch) {
    for (int p = 0; p < w; ++p) {
      for (int q = 0; q < w; ++q) {
        const uint64_t sent = sizes_of(p, lane.slot(p, epoch)).to[q];
        const uint64_t expected = sizes_of(q, lane.slot(q, epoch)).from[p];
        if (sent == expected) continue;
        team.fail(Code::kMismatch, p,
                  prim::text("all_to_all: rank ", p, " sends ", sent, " bytes to rank ", q,
                             ", which expects ", expected));
      }
    }
  }

  // Chunk [start, start + length) of all parts that did not fit.
  void others(Lane& lane, size_t begin, size_t end) const {
    const Chunks chunks{begin, end, part_bytes(team, lane)};
    const auto length = [&](size_t c, size_t size) {
      const size_t start = chunks.start(c);
      return start < size ? std::min(chunks.length(c), size - start) : size_t{0};
    };
    const auto area = [&](int p, int q) { return part_offset(p, q, chunks.chunk); };
    const auto fill = [&](size_t c, uint32_t epoch) {
      if (fitted[rank]) return;
      for (int q = 0; q < w; ++q) {
        const size_t n = q == rank ? 0 : length(c, mine.to[q]);
        if (n > 0)
          std::memcpy(lane.my_slot(epoch) + area(rank, q), part_for(q) + chunks.start(c), n);
      }
    };
    const auto drain = [&](size_t c, uint32_t epoch) {
      for (int i = 1; i < w; ++i) {
        const int p = (rank + i) % w;
        lane.wait(p, epoch);
        const size_t n = fitted[p] ? 0 : length(c, mine.from[p]);
        if (n > 0)
          std::memcpy(part_from(p) + chunks.start(c), lane.slot(p, epoch) + area(p, rank), n);
      }
    };
    pipeline(lane, chunks.count(), fill, drain);
  }

  void run() {
    const size_t longest = first_step();
    if (longest == 0) return;
    team.on_lanes(longest, 1,
                  [&](Lane& lane, size_t begin, size_t end) { others(lane, begin, end); });
  }
};

}  // namespace

void all_to_all(Team& team, DType dtype, const void* inp, const uint64_t* to, void* out,
                const uint64_t* from) {
  const Call call(team, {Op::kAllToAll, dtype, 0, 0});
  AllToAll{team, static_cast<const std::byte*>(inp), static_cast<std::byte*>(out), {to, from}}
      .run();
}

}  // namespace shm
