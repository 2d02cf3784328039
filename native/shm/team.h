// The ranks of a group as one of them sees them: their memory, waiting for them, and giving up.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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
};

// Runs task(context, begin, end) over [0, count), perhaps on several threads.
using ParallelFor = void (*)(size_t count, size_t grain, void (*task)(void*, size_t, size_t),
                             void* context);

// Where one algorithm takes over from another; the same on all ranks.
struct Tuning {
  size_t one_shot_bytes = size_t{64} << 10;  // all_reduce: one-shot up to this; 16-bit: a quarter
  size_t chunk_bytes = size_t{256} << 10;    // of a slot that one step of a pipeline uses
};

// The text of an error starts with the name of the Python exception that it becomes.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
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

  // Threads that work on one rank's share; `run` is torch's pool.
  void set_parallel(int threads, ParallelFor run) {
    threads_ = threads;
    parallel_for_ = run;
  }
  // work(begin, end) over [0, count) of `unit` bytes each, on the pool's threads where that pays.
  template <typename Work>
  void parallel(size_t count, size_t unit, Work work) {
    if (threads_ <= 1 || count * unit < 2 * kGrainBytes) return work(size_t{0}, count);
    const size_t grain = (kGrainBytes / unit + 63) / 64 * 64;
    parallel_for_(
        count, grain,
        [](void* context, size_t begin, size_t end) { (*static_cast<Work*>(context))(begin, end); },
        &work);
  }

  // --- one call, from begin() to end(), by one thread at a time ---

  void begin(const Signature& signature);
  void end() { busy_.clear(std::memory_order_release); }

  // The next step's epoch, once its slot may be written.
  uint32_t next_step() {
    const uint32_t epoch = ++epoch_;
    const uint32_t read = epoch - kSlots + kReadLag;
    if (!prim::reached(all_known_, read)) wait_all_read(read);
    return epoch;
  }
  // Tells the peers that `epoch` is in place; `payload` travels with the flag.
  void publish(uint32_t epoch, const void* payload = nullptr, size_t bytes = 0) {
    Step& step = control_->steps[epoch % kSlots];
    prim::store_relaxed(step.signature, signature_);
    if (bytes != 0) std::memcpy(step.payload, payload, bytes);
    // Sequentially consistent, as is the waiters' part: either they see the epoch before they
    // sleep or this sees that they are about to.
    step.epoch.store(epoch, std::memory_order_seq_cst);
    if (control_->sleepers.count.load(std::memory_order_seq_cst) != 0) wake(step.epoch);
  }
  // Returns when `peer` has published `epoch`; throws if it dies, is late, or is in another call.
  void wait(int peer, uint32_t epoch) {
    const Step& step = steps_[peer][epoch % kSlots];
    if (!prim::reached(known_[peer], epoch)) {
      if (!prim::reached(prim::load_acquire(step.epoch), epoch)) {
        wait_word(step.epoch, peers_[peer]->sleepers.count, epoch, peer, kEpoch);
      }
      known_[peer] = epoch;
    }
    if (epoch != first_epoch_) return;
    const uint64_t theirs = prim::load_acquire(step.signature);
    if (theirs != signature_) throw_mismatch(peer, theirs);
  }
  void wait_all(uint32_t epoch) {
    for (int peer = 0; peer < world_size_; ++peer) {
      if (peer != rank_) wait(peer, epoch);
    }
    all_known_ = epoch;
  }

  std::byte* my_slot(uint32_t epoch) const { return layout_.slot(bases_[rank_], epoch); }
  const std::byte* slot(int peer, uint32_t epoch) const {
    return layout_.slot(bases_[peer], epoch);
  }
  const std::byte* payload(int peer, uint32_t epoch) const {
    return steps_[peer][epoch % kSlots].payload;
  }

  // --- for channels ---
  Channel& channel(int from, int to) const { return *layout_.channel(bases_[from], to); }
  std::byte* ring(int from, int to) const { return layout_.ring(bases_[from], to); }

  // What `word` counts: it decides what an error says.
  enum Word { kEpoch, kBytesSent, kBytesTaken };
  // Waits until `word` has reached `expected`: spins, then sleeps, counted in `sleepers`.
  void wait_word(const prim::AtomicU32& word, prim::AtomicU32& sleepers, uint32_t expected,
                 int peer, Word kind);
  static void wake(const prim::AtomicU32& word);
  [[noreturn]] void throw_mismatch(int peer, uint64_t theirs);
  [[noreturn]] void fail(Code code, int culprit, const std::string& what);

 private:
  void wait_all_read(uint32_t epoch);
  struct Waiting {
    const prim::AtomicU32& word;
    uint32_t expected;
    int peer;
    Word kind;
  };
  void enter(const char* what);
  void map(std::vector<PeerFd> fds);
  [[noreturn]] void end_for_exit();
  void check_on_peers(const Waiting& waiting, bool deadline_passed);
  void throw_late(const Waiting& waiting);
  bool late(int peer, const Waiting& waiting) const;
  bool died(int peer) const;
  uint32_t last_epoch(int peer) const;
  std::string who(int peer) const;
  void leave(Code code, int culprit, const std::string& text);

  static constexpr size_t kGrainBytes = size_t{64} << 10;  // starting a thread costs microseconds

  int rank_;
  int world_size_;
  Options options_;
  Tuning tuning_;
  int threads_ = 1;
  ParallelFor parallel_for_ = nullptr;
  Layout layout_;
  std::string name_;
  std::vector<Region> regions_;
  std::vector<std::byte*> bases_;
  std::vector<Control*> peers_;
  std::vector<Step*> steps_;
  std::vector<pid_t> pids_;  // 0: of another pid namespace
  Control* control_ = nullptr;

  std::atomic_flag busy_;
  std::atomic<pthread_t> caller_{};         // the last one
  std::atomic<bool> told_of_exit_ = false;  // a caller, which had the error
  const uint32_t life_ = current_life() & ~1u;
  Meeting meeting_;
  bool joined_ = false;
  bool spins_ = true;
  uint64_t signature_ = 0;
  uint32_t epoch_ = 0;        // the last step begun
  uint32_t first_epoch_ = 0;  // of this call
  uint32_t all_known_ = 0;    // all peers have published this
  std::vector<uint32_t> known_;
  std::string failure_;  // why no call is possible any more
};

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
