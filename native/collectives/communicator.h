// One rank's communicator over mapped workspaces: picks the algorithm, cuts long messages, and
// turns device-side failure reports into errors. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "collectives/captures.h"
#include "collectives/collectives.h"

namespace collectives {

enum class Algorithm : int {
  kAutomatic = 0,
  kOneShot = 1,
  kStreamed = 2,
  kTwoShot = 3,
};

// Thrown with one of the codes that the C interface returns.
enum class Failure : int { kTimeout = 1, kBusy = 2, kArgument = 3, kPlatform = 4 };
class Error : public std::runtime_error {
 public:
  Error(Failure failure, const std::string& text) : std::runtime_error(text), failure(failure) {}
  const Failure failure;
};

// Which algorithm from how many bytes on. Measured on 2 x H200; the same on all ranks.
struct Tuning {
  Algorithm forced = Algorithm::kAutomatic;
  uint64_t one_shot_most = 0;  // above: streamed (2 ranks) or two-shot
  uint64_t gather_small_most = 0;
  Shape shape;  // overrides of the algorithms' own choice
};

class Communicator {
 public:
  // `bases` are this process's addresses of all ranks' workspaces, of `layout.total()` bytes each
  // and zeroed when they were allocated. Prepares this rank's own and tells the peers so.
  Communicator(const std::vector<char*>& bases, int rank, const Layout& layout);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  void all_reduce(DType dtype, const void* inp, void* out, uint64_t bytes, gpu::Stream stream);
  void all_gather(const void* inp, void* out, uint64_t bytes, gpu::Stream stream);
  void reduce_scatter(DType dtype, const void* inp, void* out, uint64_t bytes, gpu::Stream stream);

  // Throws what the device has reported since the communicator was made.
  void check() const;
  // Makes every kernel on this rank's workspace from now on end at once. Waits for those in flight.
  void retire();
  void set_timeout_ns(uint64_t timeout_ns) { ws_.spin.timeout_ns = timeout_ns; }
  // Names: algorithm, gather_small_most, and those of a Shape, where 0 is the algorithm's own
  // choice.
  void tune(const std::string& name, int64_t value);
  Algorithm algorithm_for(uint64_t bytes) const;
  int device() const { return device_; }
  // The calls that graphs have recorded; while one of those exists, the workspaces must stay
  // mapped.
  Captures& captures() { return captures_; }

 private:
  // This rank's view for a call on `stream`, which waits for the peers before the first one. Notes
  // the call where a graph records it.
  Workspace workspace(uint32_t op, DType dtype, uint64_t bytes, gpu::Stream stream);
  [[noreturn]] void throw_report() const;

  Workspace ws_{};
  Tuning tuning_;
  int device_ = 0;
  gpu::SpinReport* report_ = nullptr;  // pinned
  bool programmatic_launch_ = true;
  Captures captures_;
  bool met_ = false;  // the peers have been waited for, outside of any graph
};

}  // namespace collectives
