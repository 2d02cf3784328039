// Runs the collectives' kernels on CPU threads, W ranks at once, against plain sums: the protocol
// of native/collectives/workspace.h under the scheduling of an operating system. Prints what is
// wrong.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "collectives/collectives.h"

using namespace collectives;

namespace {

struct Rank {
  std::vector<char> memory;
  gpu::SpinReport report{};
  Workspace ws{};
};

using Ranks = std::vector<std::unique_ptr<Rank>>;

Ranks open_ranks(int world, const Layout& layout, double timeout_s) {
  Ranks ranks;
  for (int r = 0; r < world; ++r) {
    auto rank = std::make_unique<Rank>();
    rank->memory.resize(layout.total() + 128);
    ranks.push_back(std::move(rank));
  }
  for (int r = 0; r < world; ++r) {
    Workspace& ws = ranks[r]->ws;
    for (int p = 0; p < world; ++p) {
      const auto address = reinterpret_cast<uintptr_t>(ranks[p]->memory.data());
      ws.base[p] = reinterpret_cast<char*>((address + 127) & ~uintptr_t{127});
    }
    ws.layout = layout;
    const auto area = [&](uint64_t size) { return size / (world - 1) & ~uint64_t{255}; };
    ws.slot_stride = area(layout.slot);
    ws.ll_stride = area(layout.ll);
    ws.bulk_stride = area(layout.bulk);
    ws.rank = r;
    ws.world = world;
    ws.finish();
    ws.spin = {&ws.mine().aborted,
               reinterpret_cast<ulonglong2*>(ws.mine().words),
               kStateWords,
               &ranks[r]->report,
               static_cast<uint64_t>(timeout_s * 1e9),
               0,
               ws.rank};
    std::memset(ws.base[r] + layout.slot_offset(0), 0xff, 2 * layout.slot);
    for (int p = 0; p < world; ++p) ws.control(p).alive[r] = 1;
  }
  return ranks;
}

// body(rank) on a thread a rank.
template <typename Body>
void on_all(const Ranks& ranks, Body body) {
  std::vector<std::jthread> threads;
  for (auto& rank : ranks) threads.emplace_back([&body, &rank] { body(*rank); });
}

int failures = 0;
void expect(bool right, const char* what, int world, int turn, size_t count) {
  if (right) return;
  std::printf("%s: wrong at world %d, turn %d, %zu elements\n", what, world, turn, count);
  ++failures;
}

void mixed_calls(int world, int turns, uint32_t seed) {
  const Ranks ranks = open_ranks(world, Layout{8192, 8192, 8192}, 60);
  std::mt19937 random(seed);
  uint64_t epoch = 0;
  for (int turn = 0; turn < turns; ++turn) {
    const int kind = static_cast<int>(random() % 5);
    size_t count = 1 + random() % 300;
    if (kind == 2) count += 32;  // a two-shot needs 16 bytes a rank
    if (kind == 1) count = world == 2 ? 1 + random() % 9000 : count;
    std::vector<std::vector<float>> inputs(world), outputs(world);
    const size_t whole = kind == 3 ? count * world : count;
    for (auto& input : inputs) {
      input.resize(whole);
      for (float& x : input) x = static_cast<float>(random() % 1000) * 0.37f - 100.0f;
    }
    std::vector<float> sum(inputs[0]);
    for (int r = 1; r < world; ++r) {
      for (size_t i = 0; i < whole; ++i) sum[i] += inputs[r][i];
    }
    Shape shape;
    shape.blocks = 1 + static_cast<int>(random() % 3);
    shape.other_blocks = 1 + static_cast<int>(random() % 3);
    const bool in_place = random() % 2 == 0 && kind <= 2;
    for (int r = 0; r < world; ++r) {
      outputs[r].assign(kind == 4 ? count * world : count, -1.0f);
    }
    on_all(ranks, [&](Rank& rank) {
      const Workspace& ws = rank.ws;
      const int r = static_cast<int>(ws.rank);
      float* inp = inputs[r].data();
      float* out = in_place ? inp : outputs[r].data();
      const uint64_t bytes = count * sizeof(float);
      if (kind == 1 && world == 2) {
        all_reduce_streamed(ws, DType::kFloat32, inp, out, bytes, shape, nullptr);
      } else if (kind == 2) {
        all_reduce_two_shot(ws, DType::kFloat32, inp, out, bytes, shape, nullptr);
      } else if (kind == 3) {
        reduce_scatter_push(ws, DType::kFloat32, inp, out, bytes, bytes, shape, nullptr);
      } else if (kind == 4) {
        (turn % 2 ? all_gather_small : all_gather_bulk)(ws, inp, out, bytes, bytes, shape, nullptr);
      } else {
        all_reduce_one_shot(ws, DType::kFloat32, inp, out, bytes, shape, nullptr);
      }
    });
    for (int r = 0; r < world; ++r) {
      const std::vector<float>& got = in_place ? inputs[r] : outputs[r];
      bool right = true;
      if (kind == 4) {
        for (int p = 0; p < world; ++p) {
          for (size_t i = 0; i < count; ++i) right &= got[p * count + i] == inputs[p][i];
        }
      } else {
        const size_t from = kind == 3 ? r * count : 0;
        for (size_t i = 0; i < count; ++i) right &= got[i] == sum[from + i];
      }
      expect(right, "result", world, turn, count);
      expect(ranks[r]->report.code == gpu::kSpinNone, "report", world, turn, count);
    }
    // At rest: every state word the same and even, every slot empty.
    const uint64_t state = ranks[0]->ws.mine().words[0].state;
    expect(state % 2 == 0 && state / 2 > epoch, "epoch", world, turn, count);
    epoch = state / 2;
    for (auto& rank : ranks) {
      for (const StateWord& word : rank->ws.mine().words) {
        if (word.state != state) return expect(false, "state words", world, turn, count);
      }
      const auto* slot = reinterpret_cast<const uint32_t*>(rank->ws.base[rank->ws.rank] +
                                                           rank->ws.layout.slot_offset(0));
      for (size_t i = 0; i < 2 * rank->ws.layout.slot / 4; ++i) {
        if (slot[i] != gpu::kEmpty) return expect(false, "slots", world, turn, count);
      }
    }
  }
}

void missing_rank(int world) {
  const Ranks ranks = open_ranks(world, Layout{32768, 8192, 8192}, 0.2);
  std::vector<float> x(64, 1.0f), out(64);
  const Shape shape;
  for (int call = 0; call < 2; ++call) {  // the second finds the workspace aborted and ends at once
    all_reduce_one_shot(ranks[0]->ws, DType::kFloat32, x.data(), out.data(), 256, shape, nullptr);
  }
  expect(ranks[0]->report.code == gpu::kSpinLate, "late report", world, 0, 64);
  expect(ranks[0]->report.peer != 0, "late peer", world, 0, 64);
}

}  // namespace

int main(int argc, char** argv) {
  const int turns = argc > 1 ? std::atoi(argv[1]) : 40;
  const uint32_t seed = argc > 2 ? std::atoi(argv[2]) : 1;
  for (const int world : {2, 4}) {
    mixed_calls(world, turns, seed);
    missing_rank(world);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
