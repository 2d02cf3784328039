// The ranks of a group as one of them sees them: their memory, waiting for them, and giving up.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "prim/error.h"
#include "shm/fd_exchange.h"
#include "shm/process.h"
#include "shm/protocol.h"
#include "shm/region.h"
#include "shm/signature.h"

namespace shm {

struct Options {
  std::string dir;       // a tmpfs
  size_t shm_bytes = 0;  // a rank contributes at most this
  double timeout_s = 0;  // of a wait for a peer
  int64_t spin_ns = 0;   // before sleeping
  int threads = 1;       // that this rank may work with, if it has the cores
};

// Runs task(context, i) for each i of [0, count), on several threads where it can; each thread
// takes its share in ascending order. No exception leaves a task.
using ParallelFor = void (*)(size_t count, void (*task)(void*, size_t), void* context);

// Where one algorithm takes over from another; the same on all ranks.
struct Tuning {
  size_t one_shot_bytes = size_t{64} << 10;  // all_reduce: one-shot up to this; 16-bit: half
  size_t chunk_bytes = size_t{256} << 10;    // of a slot that one step of a pipeline uses
};

using Error = prim::Error;

class Team;

// One pipeline of steps, of one rank: see protocol.h. Used by one thread at a time.
class Lane {
 public:
  Lane(Team& team, int index);

  void begin() { first_epoch_ = epoch_ + 1; }

  // The next step's epoch, once its slot may be written.
  uint32_t next_step() {
    const uint32_t epoch = ++epoch_;
    const uint32_t read = epoch - kSlots + kReadLag;
    if (!prim::reached(all_known_, read)) wait_all_read(read);
    return epoch;
  }
  // Tells the peers that `epoch` is in place; `payload` travels with the flag.
  inline void publish(uint32_t epoch, const void* payload = nullptr, size_t bytes = 0);
  // Returns when `peer` has published `epoch`; throws if it dies, is late, or is in another call.
  inline void wait(int peer, uint32_t epoch);
  inline void wait_all(uint32_t epoch);

  inline size_t slot_bytes() const;
  inline std::byte* my_slot(uint32_t epoch) const;
  inline const std::byte* slot(int peer, uint32_t epoch) const;
  const std::byte* payload(int peer, uint32_t epoch) const {
    return steps_[peer][epoch % kSlots].payload;
  }

  int index() const { return index_; }
  const Step& step(int peer, uint32_t epoch) const { return steps_[peer][epoch % kSlots]; }
  uint32_t last_epoch(int peer) const;  // that `peer` has published here

 private:
  void wait_all_read(uint32_t epoch);

  Team& team_;
  int index_;
  std::vector<Step*> steps_;  // of each rank
  std::vector<uint32_t> known_;
  uint32_t epoch_ = 0;        // the last step begun
  uint32_t first_epoch_ = 0;  // of this call
  uint32_t all_known_ = 0;    // all peers have published this
};

class Team {
 public:
  // Takes this rank's memory. std::runtime_error if there is too little.
  Team(int rank, int world_size, const Options& options);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Where the peers find this rank in join(), if they are told.
  const std::string& address();
  // Maps the peers' memory. Collective; `name` and `addresses` as in exchange_fds.
  void join(const std::string& name, std::vector<std::string> addresses = {});
  // Tells the peers that this rank makes no more calls.
  void announce_close();

  // What an exit of the process waits for (process.h): a call in progress, or one that has ended
  // in another thread than `exiting`, which may not have the interpreter's lock again.
  enum class Use { kNone, kMayBeReturning, kInCall };
  Use use(pthread_t exiting) const;
  // False in a process that was forked from the one that opened it.
  bool is_mine() const { return is_of_this_process(life_); }
  std::string refusal_after_fork() const;

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  const Layout& layout() const { return layout_; }
  const std::string& name() const { return name_; }

  const Tuning& tuning() const { return tuning_; }
  void set_tuning(const Tuning& tuning) { tuning_ = tuning; }

  // What runs lanes side by side; torch's pool.
  void set_pool(ParallelFor run) { run_ = run; }
  // Between calls, once all ranks have read what lies in the slots.
  void set_lanes(int count) { layout_.set_lanes(count); }
  int lanes() const { return layout_.lanes; }
  bool core_each() const { return core_each_; }

  // --- one call, from begin() to end(), by one thread at a time ---

  void begin(const Signature& signature);
  void end() { busy_.clear(std::memory_order_release); }

  Lane& lane(int index = 0) { return lanes_[index]; }
  // work(lane, begin, end) for the parts of [0, count) that lanes take, `unit` bytes per item;
  // parts begin at multiples of kPartAlign. The same parts on all ranks.
  template <typename Work>
  void on_lanes(size_t count, size_t unit, Work work) {
    const size_t most = std::max(count * unit / kLaneBytes, size_t{1});
    const size_t lanes = std::min(static_cast<size_t>(layout_.lanes), most);
    if (lanes == 1) return work(lanes_[0], size_t{0}, count);
    const size_t part = (count / lanes + kPartAlign) / kPartAlign * kPartAlign;
    const auto one = [&](size_t l) {
      const size_t begin = std::min(l * part, count);
      const size_t end = std::min(begin + part, count);
      lanes_[l].begin();
      if (begin < end) work(lanes_[l], begin, end);
    };
    run_lanes(
        lanes, [](void* f, size_t l) { (*static_cast<decltype(one)*>(f))(l); },
        const_cast<void*>(static_cast<const void*>(&one)));
  }

  // --- for channels ---
  Channel& channel(int from, int to) const { return *layout_.channel(bases_[from], to); }
  std::byte* ring(int from, int to) const { return layout_.ring(bases_[from], to); }

  // What `word` counts: it decides what an error says.
  enum Word { kEpoch, kBytesSent, kBytesTaken };
  // Waits until `word` has reached `expected`: spins, then sleeps, counted in `sleepers`.
  // `lane` is the one that waits for an epoch.
  void wait_word(const prim::AtomicU32& word, prim::AtomicU32& sleepers, uint32_t expected,
                 int peer, Word kind, const Lane* lane = nullptr);
  static void wake(const prim::AtomicU32& word);
  [[noreturn]] void throw_mismatch(int peer, uint64_t theirs);
  [[noreturn]] void fail(Code code, int culprit, const std::string& what);

 private:
  friend class Lane;
  void meet();  // what follows from the facts of all ranks
  void run_lanes(size_t count, void (*task)(void*, size_t), void* context);
  struct Waiting {
    const prim::AtomicU32& word;
    uint32_t expected;
    int peer;
    Word kind;
    const Lane* lane;
  };
  void enter(const char* what);
  void map(std::vector<PeerFd> fds);
  [[noreturn]] void end_for_exit();
  void check_on_peers(const Waiting& waiting, bool deadline_passed);
  void throw_late(const Waiting& waiting);
  bool late(int peer, const Waiting& waiting) const;
  bool died(int peer) const;
  std::string who(int peer) const;
  void leave(Code code, int culprit, const std::string& text);

  // Of a message, for each lane that takes part: starting a thread costs microseconds.
  static constexpr size_t kLaneBytes = size_t{128} << 10;

  int rank_;
  int world_size_;
  Options options_;
  Tuning tuning_;
  ParallelFor run_ = nullptr;
  Layout layout_;
  std::string name_;
  std::vector<Region> regions_;
  std::vector<std::byte*> bases_;
  std::vector<Control*> peers_;
  std::vector<Lane> lanes_;
  std::vector<pid_t> pids_;  // 0: of another pid namespace
  Control* control_ = nullptr;

  std::atomic_flag busy_;
  std::atomic<pthread_t> caller_{};         // the last one
  std::atomic<bool> told_of_exit_ = false;  // a caller, which had the error
  const uint32_t life_ = current_life() & ~1u;
  Meeting meeting_;
  bool joined_ = false;
  bool core_each_ = false;
  uint64_t signature_ = 0;
  std::mutex failing_;   // lanes can fail at the same time
  std::string failure_;  // why no call is possible any more
};

void Lane::publish(uint32_t epoch, const void* payload, size_t bytes) {
  Control& control = *team_.control_;
  Step& step = control.steps[index_][epoch % kSlots];
  prim::store_relaxed(step.signature, team_.signature_);
  if (bytes != 0) std::memcpy(step.payload, payload, bytes);
  // Sequentially consistent, as is the waiters' part: either they see the epoch before they
  // sleep or this sees that they are about to.
  step.epoch.store(epoch, std::memory_order_seq_cst);
  if (control.sleepers.count.load(std::memory_order_seq_cst) != 0) Team::wake(step.epoch);
}

void Lane::wait(int peer, uint32_t epoch) {
  const Step& step = steps_[peer][epoch % kSlots];
  if (!prim::reached(known_[peer], epoch)) {
    if (!prim::reached(prim::load_acquire(step.epoch), epoch)) {
      team_.wait_word(step.epoch, team_.peers_[peer]->sleepers.count, epoch, peer, Team::kEpoch,
                      this);
    }
    known_[peer] = epoch;
  }
  if (epoch != first_epoch_) return;
  const uint64_t theirs = prim::load_acquire(step.signature);
  if (theirs != team_.signature_) team_.throw_mismatch(peer, theirs);
}

void Lane::wait_all(uint32_t epoch) {
  for (int peer = 0; peer < team_.world_size_; ++peer) {
    if (peer != team_.rank_) wait(peer, epoch);
  }
  all_known_ = epoch;
}

std::byte* Lane::my_slot(uint32_t epoch) const {
  return team_.layout_.slot(team_.bases_[team_.rank_], index_, epoch);
}
const std::byte* Lane::slot(int peer, uint32_t epoch) const {
  return team_.layout_.slot(team_.bases_[peer], index_, epoch);
}
size_t Lane::slot_bytes() const { return team_.layout_.lane_bytes; }

// One call's begin and end.
class Call {
 public:
  Call(Team& team, const Signature& signature) : team_(team) { team_.begin(signature); }
  ~Call() { team_.end(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  Team& team_;
};

}  // namespace shm
