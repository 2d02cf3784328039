// The exact collectives of one rank, over mapped workspaces: picks the algorithm and cuts long
// messages. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/collectives.h"
#include "collectives/communicator.h"

namespace collectives {

enum class Algorithm : int {
  kAutomatic = 0,
  kOneShot = 1,
  kStreamed = 2,
  kTwoShot = 3,
};

// Which algorithm from how many bytes on. Measured on 2 x H200; the same on all ranks.
struct Tuning {
  Algorithm forced = Algorithm::kAutomatic;
  uint64_t one_shot_most = 0;  // above: streamed (2 ranks) or two-shot
  uint64_t gather_small_most = 0;
  Shape shape;  // overrides of the algorithms' own choice
};

class CustomAllReduce : public Communicator {
 public:
  static constexpr const char* kName = "CustomAllreduce";

  // `bases` are this process's addresses of all ranks' workspaces, of `layout.total()` bytes each
  // and zeroed when they were allocated. Prepares this rank's own and tells the peers so.
  CustomAllReduce(const std::vector<char*>& bases, int rank, const Layout& layout)
      : CustomAllReduce(over(bases, rank, layout)) {}

  void all_reduce(DType dtype, const void* inp, void* out, uint64_t bytes, gpu::Stream stream);
  void all_gather(const void* inp, void* out, uint64_t bytes, gpu::Stream stream);
  void reduce_scatter(DType dtype, const void* inp, void* out, uint64_t bytes, gpu::Stream stream);

  // Names: algorithm, gather_small_most, and those of a Shape, where 0 is the algorithm's own
  // choice.
  void tune(const std::string& name, int64_t value);
  Algorithm algorithm_for(uint64_t bytes) const;

 protected:
  std::string call_of(const gpu::SpinReport& report) const override;
  std::string wait_of(const gpu::SpinReport& report) const override;

 private:
  explicit CustomAllReduce(const Workspace& ws);
  static Workspace over(const std::vector<char*>& bases, int rank, const Layout& layout);
  // This rank's view for a call on `stream`, which waits for the peers before the first one. Notes
  // the call where a graph records it.
  Workspace workspace(uint32_t op, DType dtype, uint64_t bytes, gpu::Stream stream);

  Workspace ws_;  // but for `spin`, which each call has of its own
  Tuning tuning_;
  bool programmatic_launch_ = true;
  bool met_ = false;  // the peers have been waited for, outside of any graph
};

}  // namespace collectives
