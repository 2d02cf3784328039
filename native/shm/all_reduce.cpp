// all_reduce: one-shot for small messages, two-shot in a pipeline of chunks above.
//
// One-shot: every rank puts its input into its slot and adds up all slots. One step; W-1 slots are
// read by everybody.
// Two-shot: of each chunk rank r owns part r. Step A: every rank puts the parts of the others into
// its slot. Step B: the owner adds up its part, its own input read where it lies, and puts the sum
// into its next slot. Then everybody copies the sums of the others. Each part is added once and
// moved twice, so per rank 2 (W-1)/W of the message crosses between cores: the minimum. The steps
// of neighbouring chunks are interleaved, A(c+1) B(c) read(c-1), so that a rank has work while its
// peers finish the step it needs, and chunks are small enough for the slots to stay in the cache.
#include <algorithm>

#include "prim/round.h"
#include "shm/collectives.h"
#include "shm/pipeline.h"
#include "shm/reduce.h"

namespace shm {
namespace {

using prim::round_up;

// What one lane does of it.
struct AllReduce {
  Team& team;
  Lane& lane;
  const Reduction reduction;
  const DType dtype;
  const std::byte* const inp;
  std::byte* const out;
  const size_t elements;
  const size_t size = reduced_size(reduction, dtype);
  const int w = team.world_size();
  const int rank = team.rank();

  // The message fits beside the flag.
  void in_line() {
    const size_t bytes = elements * size;
    const uint32_t epoch = lane.next_step();
    lane.publish(epoch, inp, bytes);
    lane.wait_all(epoch);
    const void* sources[kMaxRanks];
    for (int p = 0; p < w; ++p) {
      sources[p] = p == rank ? inp : lane.payload(p, epoch);
    }
    shm::reduce(reduction, dtype, out, nullptr, sources, w, elements);
  }

  void one_shot() {
    const uint32_t epoch = lane.next_step();
    std::memcpy(lane.my_slot(epoch), inp, elements * size);
    lane.publish(epoch);
    lane.wait_all(epoch);
    const void* sources[kMaxRanks];
    for (int p = 0; p < w; ++p) sources[p] = p == rank ? inp : lane.slot(p, epoch);
    shm::reduce(reduction, dtype, out, nullptr, sources, w, elements);
  }

  // A chunk and its parts.
  struct Chunk {
    size_t start;
    size_t length;
    size_t part;  // length of all parts but the last ones
    size_t begin(int p) const { return std::min(p * part, length); }
    size_t count(int p) const { return begin(p + 1) - begin(p); }
  };
  const size_t line = prim::kLineBytes / size;  // parts start on cache lines
  size_t chunk_elements = 0;
  Chunk chunk(size_t index) const {
    const size_t start = index * chunk_elements;
    const size_t length = std::min(chunk_elements, elements - start);
    return {start, length, round_up((length + w - 1) / w, line)};
  }
  // Where in p's slot the contribution to the part of q lies.
  size_t offset(const Chunk& c, int p, int q) const { return part_offset(p, q, c.part * size); }

  void contribute(const Chunk& c, uint32_t epoch) {
    std::byte* mine = lane.my_slot(epoch);
    for (int q = 0; q < w; ++q) {
      if (q == rank) continue;
      std::memcpy(mine + offset(c, rank, q), inp + (c.start + c.begin(q)) * size,
                  c.count(q) * size);
    }
  }

  void reduce(const Chunk& c, uint32_t contributed, uint32_t reduced) {
    const size_t first = c.start + c.begin(rank);
    const void* sources[kMaxRanks];
    for (int p = 0; p < w; ++p) {
      sources[p] = p == rank ? inp + first * size : lane.slot(p, contributed) + offset(c, p, rank);
    }
    shm::reduce(reduction, dtype, out + first * size, lane.my_slot(reduced), sources, w,
                c.count(rank));
  }

  void collect(const Chunk& c, uint32_t reduced) {
    for (int i = 1; i < w; ++i) {
      const int p = (rank + i) % w;  // not all from the same rank at once
      std::memcpy(out + (c.start + c.begin(p)) * size, lane.slot(p, reduced), c.count(p) * size);
    }
  }

  void two_shot() {
    const size_t slot = std::min(team.tuning().chunk_bytes, lane.slot_bytes());
    const size_t most = std::max(slot / size / (w - 1) / line, size_t{1}) * line * w;
    const size_t chunks = (elements + most - 1) / most;
    chunk_elements = round_up((elements + chunks - 1) / chunks, line * w);
    const size_t count = (elements + chunk_elements - 1) / chunk_elements;

    uint32_t contributed = lane.next_step();
    contribute(chunk(0), contributed);
    lane.publish(contributed);
    uint32_t reduced_before = 0;
    for (size_t c = 0; c < count; ++c) {
      uint32_t contributed_next = 0;
      if (c + 1 < count) {
        contributed_next = lane.next_step();
        contribute(chunk(c + 1), contributed_next);
        lane.publish(contributed_next);
      }
      lane.wait_all(contributed);
      const uint32_t reduced = lane.next_step();
      reduce(chunk(c), contributed, reduced);
      lane.publish(reduced);
      if (c > 0) {
        lane.wait_all(reduced_before);
        collect(chunk(c - 1), reduced_before);
      }
      contributed = contributed_next;
      reduced_before = reduced;
    }
    lane.wait_all(reduced_before);
    collect(chunk(count - 1), reduced_before);
  }

  bool fits_one_shot() const {
    size_t limit = std::min(team.tuning().one_shot_bytes, lane.slot_bytes());
    // Every rank adds everything in one-shot; where adding is slower than copying, less is too
    // much.
    if (dtype == DType::kBFloat16 || dtype == DType::kFloat16) limit /= 2;
    return elements * size <= limit;
  }
};

}  // namespace

void all_reduce(Team& team, DType dtype, const void* inp, void* out, size_t elements,
                Reduction reduction) {
  if (elements == 0) return;
  const size_t size = reduced_size(reduction, dtype);
  const Call call(team, {Op::kAllReduce, dtype, 0, elements * size, reduction});
  const auto part = [&](Lane& lane, size_t begin, size_t end) {
    return AllReduce{team,
                     lane,
                     reduction,
                     dtype,
                     static_cast<const std::byte*>(inp) + begin * size,
                     static_cast<std::byte*>(out) + begin * size,
                     end - begin};
  };
  AllReduce whole = part(team.lane(), 0, elements);
  if (elements * size <= kPayloadBytes) return whole.in_line();
  if (whole.fits_one_shot()) return whole.one_shot();
  team.on_lanes(elements, size,
                [&](Lane& lane, size_t begin, size_t end) { part(lane, begin, end).two_shot(); });
}

}  // namespace shm
