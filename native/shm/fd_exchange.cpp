#include "shm/fd_exchange.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "shm/interrupt.h"
#include "shm/peer_socket.h"
#include "shm/process.h"
#include "shm/region.h"

namespace shm {
namespace {

// A round ends after so many who have connected, whoever they are: strangers may keep on coming.
constexpr int kAcceptsARound = 256;
constexpr int kLongestPauseMs = 16;

[[noreturn]] void fail(const std::string& kind, const std::string& name, const std::string& what) {
  throw std::runtime_error(kind + ": exchange of descriptors '" + name + "': " + what);
}

std::string rank_name(int rank, pid_t pid) {
  const std::string name = "rank " + std::to_string(rank);
  return pid > 0 ? name + " (pid " + std::to_string(pid) + ")" : name;
}

class Exchange {
 public:
  Exchange(const std::string& name, Meeting meeting, std::vector<std::string> addresses, int rank,
           int world_size, int fd)
      : name_(name),
        rank_(rank),
        world_size_(world_size),
        fd_(fd),
        told_(!addresses.empty()),
        meeting_(std::move(meeting)),
        addresses_(std::move(addresses)),
        peers_(world_size),
        received_(world_size) {
    if (world_size < 1 || rank < 0 || rank >= world_size) {
      fail("InvalidArgumentError", name,
           "rank " + std::to_string(rank) + " is not in 0.." + std::to_string(world_size - 1));
    }
    if (told_ && (static_cast<int>(addresses_.size()) != world_size || !meeting_.socket)) {
      fail("InvalidArgumentError", name,
           std::to_string(addresses_.size()) + " addresses for " + std::to_string(world_size) +
               " ranks, of which this one has its own");
    }
    for (int r = 0; !told_ && r < world_size; ++r) addresses_.push_back(address_of(name, r));
  }

  std::vector<PeerFd> run(const prim::Deadline& deadline) {
    peers_[rank_].sent = true;
    received_[rank_].pid = ::getpid();
    if (!told_) listen(deadline);
    int pause_ms = 1;
    for (;;) {
      for (int peer = 0; peer < world_size_; ++peer) {
        if (!peers_[peer].sent) call(peer);
      }
      const bool all_read = receive();
      if (complete()) break;
      if (all_read) check_on_peers();
      // While a peer has no socket yet there is nothing to be woken by: look again soon.
      wait(all_sent() ? 50 : pause_ms);
      pause_ms = std::min(pause_ms * 2, kLongestPauseMs);
      throw_if_stopped();
      if (deadline.passed()) throw_late();
    }
    return std::move(received_);
  }

 private:
  // The way to a peer; what comes from it comes over a connection of its own.
  struct Peer {
    Fd socket;
    pid_t pid = 0;
    bool sent = false;
    bool nobody = false;   // listens there
    bool hung_up = false;  // it is through, and has sent what it has, or is gone
  };

  bool all_sent() const {
    return std::all_of(peers_.begin(), peers_.end(), [](const Peer& p) { return p.sent; });
  }
  bool have(int peer) const { return peer == rank_ || received_[peer].fd; }
  bool complete() const {
    for (int peer = 0; peer < world_size_; ++peer) {
      if (!have(peer)) return false;
    }
    return all_sent();
  }

  void throw_if_stopped() const {
    throw_if_interrupted();
    throw_if_exiting("exchange of descriptors '" + name_ + "'");
  }

  // At the address that follows from the name, which may still be a process's that is being killed.
  void listen(const prim::Deadline& deadline) {
    for (int pause_ms = 1;; pause_ms = std::min(pause_ms * 2, kLongestPauseMs)) {
      meeting_.socket = make_socket();
      if (meeting_.socket && listen_at(meeting_.socket, addresses_[rank_])) return;
      const int error = errno;
      if (error == EADDRINUSE) look_who_has(rank_);
      if (error != EADDRINUSE || deadline.passed()) {
        fail(error == EADDRINUSE ? "CommTimeoutError" : "CommunicatorError", name_,
             "rank " + std::to_string(rank_) + " cannot bind its socket: " + std::strerror(error) +
                 "; every exchange of one user needs a name of its own, and any user of the "
                 "machine may have taken it");
      }
      ::usleep(pause_ms * 1000);
      throw_if_stopped();
    }
  }

  // Fails if it is another user's.
  void look_who_has(int rank) {
    const Fd socket = make_socket();
    if (socket && connect_to(socket, addresses_[rank])) check_owner(rank, peer_of(socket));
  }
  void check_owner(int rank, const ucred& owner) const {
    if (owner.uid == ::geteuid()) return;
    fail("RefusedError", name_,
         "user " + std::to_string(owner.uid) + " (pid " + std::to_string(owner.pid) +
             ") has taken the socket name of rank " + std::to_string(rank) + ", and rank " +
             std::to_string(rank_) + " is of user " + std::to_string(::geteuid()) +
             ", whose memory is shared with that user alone; take another name for the group");
  }

  // Connects to a peer and sends it the descriptor, if it is there.
  void call(int to) {
    Peer& peer = peers_[to];
    if (!peer.socket) {
      Fd socket = make_socket();
      if (!socket) {
        fail("CommunicatorError", name_,
             std::string("no socket can be made: ") + std::strerror(errno));
      }
      peer.nobody = !connect_to(socket, addresses_[to]) && errno == ECONNREFUSED;
      const ucred owner = peer_of(socket);
      // Not connected. (A full queue is one that will be read, EAGAIN.)
      if (owner.uid == static_cast<uid_t>(-1)) return;
      // Nobody takes an address of the kernel's from a process that lives.
      peer.nobody = told_ && owner.uid != ::geteuid();
      if (peer.nobody) return;
      check_owner(to, owner);
      peer.pid = owner.pid;
      peer.socket = std::move(socket);
    }
    Hello hello{{}, Hello::kVersion, rank_, world_size_, 0, hash_of(name_)};
    std::memcpy(hello.magic, Hello::kMagic, sizeof hello.magic);
    const Transfer sent = send_hello(peer.socket, hello, fd_);
    peer.sent = sent == Transfer::kDone;
    if (sent != Transfer::kFailed) return;
    if (errno == EPIPE || errno == ECONNRESET) {  // it hung up at once
      peer.socket.reset();
      return;
    }
    fail("CommunicatorError", name_,
         "rank " + std::to_string(rank_) + " cannot send to " + rank_name(to, peer.pid) + ": " +
             std::strerror(errno));
  }

  // Takes what has come. False if there may be more.
  bool receive() {
    int accepted = 0;
    for (; accepted < kAcceptsARound; ++accepted) {
      Fd socket = accept_from(meeting_.socket);
      if (!socket && (errno == EMFILE || errno == ENFILE)) {
        fail("CommunicatorError", name_,
             "a connection cannot be taken: " + std::string(std::strerror(errno)) +
                 "; this process may be at its limit of open files (ulimit -n)");
      }
      if (!socket) break;
      // An abstract name is open to every user of the machine.
      if (peer_of(socket).uid == ::geteuid()) callers_.push_back(std::move(socket));
    }
    std::vector<Fd> silent;
    for (Fd& caller : callers_) {
      if (!hear(caller)) silent.push_back(std::move(caller));
    }
    // A rank speaks when it has connected: of those who do not, a few are enough.
    const size_t most = static_cast<size_t>(world_size_) + 16;
    const size_t too_many = silent.size() > most ? silent.size() - most : 0;
    silent.erase(silent.begin(), silent.begin() + static_cast<std::ptrdiff_t>(too_many));
    callers_ = std::move(silent);
    return accepted < kAcceptsARound;
  }

  // Whether all was said that is to be said; false: it may come yet.
  bool hear(Fd& caller) {
    Hello hello{};
    Fd fd;
    const Transfer heard = receive_hello(caller, hello, fd);
    if (heard == Transfer::kNotYet) return false;
    if (heard == Transfer::kDone && hello.exchange == hash_of(name_)) {
      admit(hello, peer_of(caller).pid, std::move(fd));
      heard_.push_back(std::move(caller));
    }
    return true;
  }

  void admit(const Hello& hello, pid_t pid, Fd fd) {
    const std::string who = rank_name(hello.rank, pid);
    if (hello.version != Hello::kVersion) {
      fail("CommMismatchError", name_,
           who + " speaks version " + std::to_string(hello.version) + ", this rank version " +
               std::to_string(Hello::kVersion));
    }
    if (hello.world_size != world_size_ || hello.rank < 0 || hello.rank >= world_size_ ||
        hello.rank == rank_) {
      fail("CommMismatchError", name_,
           who + " of " + std::to_string(hello.world_size) + " called this rank, " +
               std::to_string(rank_) + " of " + std::to_string(world_size_));
    }
    if (!fd) {
      fail("CommunicatorError", name_,
           "the descriptor of " + who +
               " did not arrive; this process may be at its limit of open files (ulimit -n)");
    }
    if (have(hello.rank)) {
      fail("CommMismatchError", name_,
           who + " answered twice, the first time as pid " +
               std::to_string(received_[hello.rank].pid) +
               "; every exchange needs a name of its own");
    }
    received_[hello.rank] = PeerFd{std::move(fd), pid};
  }

  // Fails if a peer is gone. All that had come before this was noticed has been read.
  void check_on_peers() const {
    for (int p = 0; p < world_size_; ++p) {
      const Peer& peer = peers_[p];
      const bool ended_before_it_heard =
          !peer.sent &&
          ((told_ && peer.nobody) || (p != rank_ && have(p) && owner_is_gone(received_[p].fd)));
      if (!ended_before_it_heard && (have(p) || !peer.hung_up)) continue;
      fail("PeerDiedError", name_,
           rank_name(p, std::max(peer.pid, received_[p].pid)) + " died, or gave up, while rank " +
               std::to_string(rank_) + " waited for it");
    }
  }

  void wait(int ms) {
    std::vector<pollfd> watched{{meeting_.socket.get(), POLLIN, 0}};
    for (const Fd& caller : callers_) watched.push_back({caller.get(), POLLIN, 0});
    const size_t first = watched.size();
    std::vector<Peer*> connected;
    for (Peer& peer : peers_) {
      if (!peer.socket || !peer.sent || peer.hung_up) continue;
      connected.push_back(&peer);
      watched.push_back({peer.socket.get(), 0, 0});  // POLLHUP is always told
    }
    if (::poll(watched.data(), watched.size(), ms) <= 0) return;
    for (size_t i = 0; i < connected.size(); ++i) {
      connected[i]->hung_up = watched[first + i].revents != 0;
    }
  }

  [[noreturn]] void throw_late() const {
    std::string late;
    for (int peer = 0; peer < world_size_; ++peer) {
      if (have(peer) && peers_[peer].sent) continue;
      late += (late.empty() ? "" : ", ") + std::to_string(peer);
    }
    fail("CommTimeoutError", name_,
         "rank " + std::to_string(rank_) + " of " + std::to_string(world_size_) +
             " has no answer from rank " + late +
             "; all ranks must call with this name, on one host, in one network namespace and as "
             "one user");
  }

  std::string name_;
  int rank_;
  int world_size_;
  int fd_;
  bool told_;
  Meeting meeting_;
  std::vector<std::string> addresses_;
  std::vector<Peer> peers_;
  std::vector<Fd> callers_;  // of this user, who have not spoken yet
  std::vector<Fd> heard_;    // the ranks' connections: they hang up when this rank is through
  std::vector<PeerFd> received_;
};

}  // namespace

Meeting Meeting::anywhere() {
  Meeting meeting;
  meeting.socket = make_socket();
  if (!meeting.socket || !listen_at(meeting.socket, "")) {
    throw std::runtime_error(
        std::string("CommunicatorError: exchange of descriptors: no socket can be bound: ") +
        std::strerror(errno));
  }
  meeting.address = address_of(meeting.socket);
  return meeting;
}

std::vector<PeerFd> exchange_fds(const std::string& name, Meeting meeting,
                                 std::vector<std::string> addresses, int rank, int world_size,
                                 int fd, const prim::Deadline& deadline) {
  return Exchange(name, std::move(meeting), std::move(addresses), rank, world_size, fd)
      .run(deadline);
}

}  // namespace shm
