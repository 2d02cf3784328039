// Lanes: the parts of a team's calls that its threads run side by side.
#include <exception>

#include "shm/team.h"

namespace shm {

Lane::Lane(Team& team, int index) : team_(team), index_(index), known_(team.world_size_, 0) {
  for (Control* peer : team.peers_) steps_.push_back(peer->steps[index]);
}

void Lane::wait_all_read(uint32_t epoch) {
  // Not wait(): that the step is of the same call is not what is asked here.
  for (int peer = 0; peer < team_.world_size_; ++peer) {
    if (peer == team_.rank_ || prim::reached(known_[peer], epoch)) continue;
    const prim::AtomicU32& word = step(peer, epoch).epoch;
    if (!prim::reached(prim::load_acquire(word), epoch)) {
      team_.wait_word(word, team_.peers_[peer]->sleepers.count, epoch, peer, Team::kEpoch, this);
    }
    known_[peer] = epoch;
  }
  all_known_ = epoch;
}

uint32_t Lane::last_epoch(int peer) const {
  uint32_t last = prim::load_acquire(steps_[peer][0].epoch);
  for (uint32_t i = 1; i < kSlots; ++i) {
    const uint32_t epoch = prim::load_acquire(steps_[peer][i].epoch);
    if (prim::reached(epoch, last)) last = epoch;
  }
  return last;
}

void Team::run_lanes(size_t count, void (*task)(void*, size_t), void* context) {
  struct Lanes {
    void (*task)(void*, size_t);
    void* context;
    std::exception_ptr failed[kMaxLanes];  // the pool would make other exceptions of them
  } lanes{task, context, {}};
  run_(
      count,
      [](void* all, size_t l) {
        Lanes& lanes = *static_cast<Lanes*>(all);
        try {
          lanes.task(lanes.context, l);
        } catch (...) {
          lanes.failed[l] = std::current_exception();
        }
      },
      &lanes);
  // Lane 0 first: it is this thread's, which signals interrupt.
  for (const std::exception_ptr& failed : lanes.failed) {
    if (failed) std::rethrow_exception(failed);
  }
}

}  // namespace shm
