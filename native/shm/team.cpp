#include "shm/team.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <exception>

#include "prim/deadline.h"
#include "prim/futex.h"
#include "shm/interrupt.h"

namespace shm {
namespace {

// A sleeper looks after its peers this often. It bounds how late a death is noticed.
constexpr int64_t kSliceNs = 20'000'000;
// Where there are more ranks than cores a longer spin only keeps the peers from running.
constexpr int64_t kOversubscribedSpinNs = 5'000;
constexpr int kPausesBetweenYields = 16;

// Up to where all_reduce is faster one-shot. It reads (W-1) n from other cores where two-shot reads
// 2 (W-1)/W n and meets once more, for the time of kMeeting bytes: measured on 16 cores, crossing
// over at 8 KB for W = 4, 2 KB for 8 and 1 KB for 16. Where ranks share cores a meeting costs
// context switches.
size_t one_shot_limit(int world_size, bool core_each) {
  constexpr size_t kMost = size_t{64} << 10, kMeeting = size_t{10} << 10;
  const auto w = static_cast<size_t>(world_size);
  if (w == 2 || !core_each) return kMost;
  return std::min(kMost, kMeeting * w / ((w - 1) * (w - 2)));
}

const char* error_name(Code code) {
  switch (code) {
    case Code::kTimeout:
      return "CommTimeoutError: ";
    case Code::kPeerDied:
    case Code::kClosed:
      return "PeerDiedError: ";
    case Code::kMismatch:
      return "CommMismatchError: ";
    default:
      return "CommunicatorError: ";
  }
}

}  // namespace

Team::Team(int rank, int world_size, const Options& options)
    : rank_(rank),
      world_size_(world_size),
      options_(options),
      layout_(world_size, options.shm_bytes),
      regions_(world_size),
      bases_(world_size),
      peers_(world_size),
      pids_(world_size) {
  if (rank < 0 || rank >= world_size) {
    throw Error("InvalidArgumentError: CPU shared memory: rank " + std::to_string(rank) +
                " is not in 0.." + std::to_string(world_size - 1));
  }
  pids_[rank] = ::getpid();
  regions_[rank] = Region::create(options.dir, layout_.bytes);
  control_ = layout_.control(regions_[rank].data());
  control_->version = kLayoutVersion;
  control_->world_size = static_cast<uint32_t>(world_size);
  control_->slot_bytes = layout_.slot_bytes;
  control_->ring_bytes = layout_.ring_bytes;
  control_->cpus = my_cpus(options.threads);
}

Team::~Team() { announce_close(); }

void Team::announce_close() {
  if (joined_ && is_mine()) {
    leave(Code::kClosed, rank_, "rank " + std::to_string(rank_) + " closed it");
  }
}

const std::string& Team::address() {
  if (!meeting_.socket) meeting_ = Meeting::anywhere();
  return meeting_.address;
}

void Team::join(const std::string& name, std::vector<std::string> addresses) {
  enter("join");
  const struct Left {
    Team& team;
    ~Left() { team.end(); }
  } left{*this};
  name_ = name;
  try {
    map(exchange_fds(name, std::move(meeting_), std::move(addresses), rank_, world_size_,
                     regions_[rank_].fd(), prim::Deadline::after_seconds(options_.timeout_s)));
  } catch (const std::exception&) {
    told_of_exit_ = exit_ends_this_call();
    throw;
  }
  joined_ = true;
}

void Team::map(std::vector<PeerFd> fds) {
  for (int peer = 0; peer < world_size_; ++peer) {
    pids_[peer] = fds[peer].pid;
    if (peer != rank_) regions_[peer] = Region::map(std::move(fds[peer].fd), sizeof(Control));
    bases_[peer] = regions_[peer].data();
    peers_[peer] = layout_.control(bases_[peer]);
    const Control& theirs = *peers_[peer];
    if (theirs.version != kLayoutVersion || theirs.world_size != control_->world_size ||
        theirs.slot_bytes != layout_.slot_bytes || theirs.ring_bytes != layout_.ring_bytes ||
        regions_[peer].size() < layout_.bytes) {
      throw Error(
          "CommMismatchError: group " + name_ + ": the memory of rank " + std::to_string(peer) +
          " is laid out otherwise than that of rank " + std::to_string(rank_) +
          "; the version of the library and COMMUNICATORS_SHM_BYTES must be the same on all "
          "ranks");
    }
  }
  meet();
}

void Team::meet() {
  std::vector<const Cpus*> cpus;
  for (const Control* peer : peers_) cpus.push_back(&peer->cpus);
  const Plan plan = plan_cpus(cpus);
  core_each_ = plan.core_each;
  layout_.set_lanes(plan.threads);
  tuning_.one_shot_bytes = one_shot_limit(world_size_, core_each_);
  for (int l = 0; l < kMaxLanes; ++l) lanes_.emplace_back(*this, l);
}

Team::Use Team::use(pthread_t exiting) const {
  if (busy_.test(std::memory_order_seq_cst)) return Use::kInCall;
  const pthread_t caller = caller_.load(std::memory_order_relaxed);
  if (caller == pthread_t{} || ::pthread_equal(caller, exiting) != 0 || told_of_exit_) {
    return Use::kNone;
  }
  return Use::kMayBeReturning;
}

// The beginning of every call.
void Team::enter(const char* what) {
  // Sequentially consistent, as is the look of an exit: either this sees that the process exits, or
  // that sees this call.
  if (busy_.test_and_set(std::memory_order_seq_cst)) {
    throw Error("CommunicatorError: group " + name_ + ", rank " + std::to_string(rank_) +
                ": a second thread called while a call was in progress; a communicator is used by "
                "one thread at a time");
  }
  caller_.store(::pthread_self(), std::memory_order_relaxed);
  if (current_life() == life_) return;
  if (!is_mine()) {
    end();
    throw Error(refusal_after_fork());
  }
  if (!exit_ends_this_call()) return;
  end();
  stop_unless_new();
  told_of_exit_ = true;
  throw Error("Exiting: group " + name_ + ": rank " + std::to_string(rank_) + " calls " + what +
              ", and its process exits");
}

std::string Team::refusal_after_fork() const {
  return "RefusedError: group " + name_ + ", rank " + std::to_string(rank_) +
         ": it belongs to process " + std::to_string(pids_[rank_]) +
         ", and this is its forked child " + std::to_string(::getpid()) +
         "; a child opens a group of its own";
}

// The exit of the process in the midst of a call.
void Team::end_for_exit() {
  stop_unless_new();
  told_of_exit_ = true;
  const std::string what = "rank " + std::to_string(rank_) + " waits in " + describe(signature_) +
                           ", and its process exits";
  {
    const std::lock_guard lock(failing_);
    failure_ = "CommunicatorError: group " + name_ + ": " + what;
  }
  announce_close();
  throw Error("Exiting: group " + name_ + ": " + what);
}

void Team::begin(const Signature& signature) {
  enter(name_of(signature.op));
  if (!failure_.empty() || !joined_) {
    end();
    throw Error(joined_ ? failure_ : "CommunicatorError: the group has not been joined");
  }
  signature_ = signature.packed();
  lanes_[0].begin();
}

void Team::wake(const prim::AtomicU32& word) { prim::futex_wake(word); }

void Team::wait_word(const prim::AtomicU32& word, prim::AtomicU32& sleepers, uint32_t expected,
                     int peer, Word kind, const Lane* lane) {
  const int64_t begun = prim::monotonic_ns();
  const int64_t spin =
      core_each_ ? options_.spin_ns : std::min(options_.spin_ns, kOversubscribedSpinNs);
  do {
    for (int i = 0; i < kPausesBetweenYields; ++i) {
      if (prim::reached(prim::load_acquire(word), expected)) return;
      prim::cpu_pause();
    }
    // The peer may be waiting for this very core: other work on the machine can put two ranks on
    // one. With nobody waiting this costs a fraction of a microsecond.
    ::sched_yield();
  } while (prim::monotonic_ns() - begun < spin && prim::load_relaxed(process_life) == life_);

  struct Sleeping {
    prim::AtomicU32& count;
    explicit Sleeping(prim::AtomicU32& c) : count(c) { count.fetch_add(1); }
    ~Sleeping() { count.fetch_sub(1); }
  } sleeping(sleepers);
  const prim::Deadline deadline = prim::Deadline::after_seconds(options_.timeout_s);
  for (;;) {
    const uint32_t seen = word.load(std::memory_order_seq_cst);
    if (prim::reached(seen, expected)) return;
    prim::futex_wait(word, seen, std::min(kSliceNs, std::max<int64_t>(deadline.left_ns(), 1)));
    if (prim::reached(prim::load_acquire(word), expected)) return;
    check_on_peers({word, expected, peer, kind, lane}, deadline.passed());
  }
}

// Whether it is `peer`, among others perhaps, that a wait is for.
bool Team::late(int peer, const Waiting& waiting) const {
  if (peer == rank_) return false;
  if (waiting.kind != kEpoch) {
    return peer == waiting.peer &&
           !prim::reached(prim::load_acquire(waiting.word), waiting.expected);
  }
  // In a collective everybody is needed, and the first one late may wait for another.
  return !prim::reached(prim::load_acquire(waiting.lane->step(peer, waiting.expected).epoch),
                        waiting.expected);
}

// A peer that closes gives up its lock as one that dies does, but says so before.
bool Team::died(int peer) const {
  return pids_[peer] != pids_[rank_] && regions_[peer].owner_is_gone() &&
         prim::load_acquire(peers_[peer]->abort.code) == 0;
}

void Team::check_on_peers(const Waiting& waiting, bool deadline_passed) {
  if (waiting.lane != nullptr && waiting.lane->index() != 0) {
    // Another thread of this rank: lane 0 sees to exits and signals, and whoever fails first fails
    // for all.
    if (prim::load_acquire(control_->abort.code) != 0) fail(Code::kNone, rank_, "");
  } else if (exit_ends_this_call()) {
    end_for_exit();
  } else if (python_handler_raised()) {
    fail(Code::kInterrupted, rank_,
         "rank " + std::to_string(rank_) + " was interrupted by a signal handler that raised, in " +
             describe(signature_));
  }
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    const Abort& abort = peers_[peer]->abort;
    const auto code = static_cast<Code>(prim::load_acquire(abort.code));
    if (code == Code::kNone) continue;
    if (code != Code::kClosed) fail(code, abort.culprit, abort.text);
    if (late(peer, waiting)) {
      fail(Code::kClosed, peer,
           who(peer) + " closed the group and rank " + std::to_string(rank_) + " waits for it in " +
               describe(signature_));
    }
  }
  for (int peer = 0; peer < world_size_; ++peer) {
    if (late(peer, waiting) && died(peer) && late(peer, waiting)) {
      fail(Code::kPeerDied, peer,
           who(peer) + " died; rank " + std::to_string(rank_) + " waits for it in " +
               describe(signature_));
    }
  }
  if (deadline_passed) throw_late(waiting);
}

void Team::throw_late(const Waiting& waiting) {
  std::string ranks;
  int first = -1;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (!late(peer, waiting)) continue;
    if (first < 0) first = peer;
    ranks += (ranks.empty() ? "" : ", ") + who(peer);
    if (waiting.kind == kEpoch) {
      ranks += ", which is at step " + std::to_string(waiting.lane->last_epoch(peer));
    }
  }
  if (first < 0) return;  // it has arrived meanwhile
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g", options_.timeout_s);
  std::string at;
  if (waiting.kind == kEpoch) at = ", step " + std::to_string(waiting.expected);
  if (waiting.kind == kBytesSent) at = ", for bytes to arrive";
  if (waiting.kind == kBytesTaken) at = ", for bytes to be taken";
  fail(Code::kTimeout, first,
       "rank " + std::to_string(rank_) + " waited " + seconds + " s in " + describe(signature_) +
           at + ", for " + ranks);
}

void Team::throw_mismatch(int peer, uint64_t theirs) {
  if (theirs == kWithdrawn) {
    const Abort& abort = peers_[peer]->abort;
    fail(static_cast<Code>(prim::load_acquire(abort.code)), abort.culprit, abort.text);
  }
  fail(Code::kMismatch, peer,
       "rank " + std::to_string(rank_) + " calls " + describe(signature_) + " and rank " +
           std::to_string(peer) + " calls " + describe(theirs) + "; the calls must match");
}

void Team::fail(Code code, int culprit, const std::string& what) {
  {
    const std::lock_guard lock(failing_);
    if (failure_.empty()) {
      failure_ = error_name(code) + ("group " + name_ + ": ") + what;
      leave(code, culprit, what);
    }
  }
  if (code == Code::kInterrupted && culprit == rank_) throw Interrupted();
  throw Error(failure_);
}

void Team::leave(Code code, int culprit, const std::string& text) {
  Abort& mine = control_->abort;
  if (prim::load_relaxed(mine.code) != 0) return;
  mine.culprit = culprit;
  std::strncpy(mine.text, text.c_str(), sizeof mine.text - 1);
  mine.code.store(static_cast<uint32_t>(code), std::memory_order_seq_cst);
  if (code != Code::kClosed) {
    for (auto& lane : control_->steps) {
      for (Step& step : lane) prim::store_release(step.signature, kWithdrawn);
    }
  }
  // Whoever waits for this rank looks around when woken.
  for (auto& lane : control_->steps) {
    for (Step& step : lane) wake(step.epoch);
  }
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_ || bases_[peer] == nullptr) continue;
    wake(channel(rank_, peer).head);
    wake(channel(peer, rank_).tail);
  }
}

std::string Team::who(int peer) const {
  const std::string pid = pids_[peer] > 0 ? "pid " + std::to_string(pids_[peer])
                                          : std::string("in another pid namespace");
  return "rank " + std::to_string(peer) + " (" + pid + ")";
}

}  // namespace shm
