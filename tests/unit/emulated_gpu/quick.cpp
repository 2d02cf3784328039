// The ranks of a quantized all-reduce on CPU threads, called through ctypes.
#include <string>

#include "collectives/quick_all_reduce.h"

using namespace quick;

namespace {

struct Rank {
  std::vector<char> memory;
  gpu::SpinReport report{};
  View view{};
};
struct Ranks {
  std::vector<std::unique_ptr<Rank>> of;
  uint64_t calls = 0;
  std::string wrong;
};

// What quick_all_reduce.h promises of a buffer at rest.
std::string at_rest(const View& view, uint64_t calls) {
  const Control& control = view.control(view.rank);
  for (const StateWord& word : control.words) {
    if (word.state != 2 * calls) return "a state word";
    if (word.aborted != 0) return "an aborted word";
  }
  const char* areas = view.base[view.rank] + kControlBytes;
  for (uint64_t i = 0; i < 4 * view.area_bytes; ++i) {
    if (areas[i] != 0) return "byte " + std::to_string(i) + " of the areas";
  }
  return "";
}

}  // namespace

extern "C" {

void* quick_open(int world, uint64_t area, double timeout_s) {
  auto ranks = std::make_unique<Ranks>();
  for (int r = 0; r < world; ++r) {
    ranks->of.push_back(std::make_unique<Rank>());
    ranks->of[r]->memory.resize(kControlBytes + 4 * area + 128);
  }
  for (int r = 0; r < world; ++r) {
    View& view = ranks->of[r]->view;
    for (int p = 0; p < world; ++p) {
      const auto address = reinterpret_cast<uintptr_t>(ranks->of[p]->memory.data());
      view.base[p] = reinterpret_cast<char*>((address + 127) & ~uintptr_t{127});
    }
    view.area_bytes = area;
    view.rank = r;
    Control& control = view.control(r);
    view.spin = {&control.aborted,
                 reinterpret_cast<ulonglong2*>(control.words),
                 kMaxBlocks,
                 &ranks->of[r]->report,
                 static_cast<uint64_t>(timeout_s * 1e9),
                 0,
                 view.rank};
  }
  return ranks.release();
}

// One call of the ranks below `present`, in launches of as many tiles as an area holds; null, or
// what is wrong.
const char* quick_run(void* handle, int codec, int dtype, void** inputs, void** outputs,
                      uint64_t bytes, int present, int blocks, int ahead) {
  auto& ranks = *static_cast<Ranks*>(handle);
  const auto world = static_cast<uint32_t>(ranks.of.size());
  const auto chosen = static_cast<Codec>(codec);
  const uint64_t most = tiles_at_once(ranks.of[0]->view, world, chosen) * kTileBytes;
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < present; ++r) {
      threads.emplace_back([&, r] {
        for (uint64_t begin = 0; begin < bytes; begin += most) {
          all_reduce(ranks.of[r]->view, world, chosen,
                     static_cast<DType>(dtype),
                     static_cast<char*>(inputs[r]) + begin, static_cast<char*>(outputs[r]) + begin,
                     std::min(bytes - begin, most), {blocks, 32, ahead, false}, nullptr);
        }
      });
    }
  }
  ranks.calls += (bytes + most - 1) / most;
  ranks.wrong.clear();
  for (int r = 0; r < present; ++r) {
    const Rank& rank = *ranks.of[r];
    if (rank.report.code != gpu::kSpinNone) {
      ranks.wrong =
          "rank " + std::to_string(r) + " waited for rank " + std::to_string(rank.report.peer);
      break;
    }
    ranks.wrong = at_rest(rank.view, ranks.calls);
    if (!ranks.wrong.empty()) break;
  }
  return ranks.wrong.empty() ? nullptr : ranks.wrong.c_str();
}

void quick_close(void* handle) { delete static_cast<Ranks*>(handle); }

}  // extern "C"
