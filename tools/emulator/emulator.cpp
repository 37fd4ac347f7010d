#include "cuda_runtime.h"

#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <vector>

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
char* dynamic_shared;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

// Threads that wait for each other. Two exchanges, as the first to go on may come again before the
// last has read what was brought.
struct Meeting {
  int members = 0, arrived = 0;
  uint64_t number = 0;
  Exchange exchanges[2] = {};

  Exchange& now() { return exchanges[number % 2]; }
  void close_if_all_are_here() {
    if (members == 0 || arrived < members) return;
    arrived = 0;
    ++number;
    now() = {};
  }
};

struct Thread {
  ucontext_t context;
  uint3 index;
  bool done = false;
};

std::vector<Thread> threads;
std::vector<Meeting> warps;
Meeting block;
size_t current;
int running;
ucontext_t outside;
const std::function<void()>* body;

// Lets the next thread run, or whoever started the block if all are done.
void give_way() {
  ucontext_t* from = &threads[current].context;
  if (running == 0) {
    swapcontext(from, &outside);
    return;
  }
  do {
    current = (current + 1) % threads.size();
  } while (threads[current].done);
  thread_index = threads[current].index;
  if (from != &threads[current].context) swapcontext(from, &threads[current].context);
}

const Exchange& meet(Meeting& meeting, int place, uint64_t own) {
  Exchange& exchange = meeting.now();
  exchange.of_lane[place] = own;
  exchange.present[place] = true;
  const uint64_t number = meeting.number;
  ++meeting.arrived;
  meeting.close_if_all_are_here();
  for (long turns = 0; meeting.number == number; ++turns) {
    if (turns > 10'000'000) {
      std::printf("block (%u, %u, %u): threads wait for each other\n", block_index.x, block_index.y,
                  block_index.z);
      std::abort();
    }
    give_way();
  }
  return exchange;
}

void run_thread() {
  (*body)();
  threads[current].done = true;
  --running;
  for (Meeting* meeting : {&warps[thread_index.x / 32], &block}) {
    --meeting->members;
    meeting->close_if_all_are_here();
  }
  give_way();
}

void run_block(const std::vector<std::unique_ptr<char[]>>& stacks) {
  warps.assign((threads.size() + 31) / 32, {});
  block = {};
  running = block.members = static_cast<int>(threads.size());
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].index = {static_cast<unsigned>(i), 0, 0};
    threads[i].done = false;
    ++warps[i / 32].members;
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = stacks[i].get();
    threads[i].context.uc_stack.ss_size = kStackBytes;
    makecontext(&threads[i].context, run_thread, 0);
  }
  current = 0;
  thread_index = threads[0].index;
  swapcontext(&outside, &threads[0].context);
}

}  // namespace

const Exchange& meet_warp(uint64_t own) {
  return meet(warps[thread_index.x / 32], thread_index.x % 32, own);
}
// Any member's place will do for what only counts as true.
bool meet_block(bool own) { return meet(block, own ? 1 : 0, own).of_lane[1]; }

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  grid_size = config.gridDim;
  block_size = config.blockDim;
  body = &thread;
  threads.resize(block_size.x);
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < threads.size()) stacks.emplace_back(new char[kStackBytes]);
  for (block_index.z = 0; block_index.z < grid_size.z; ++block_index.z) {
    for (block_index.y = 0; block_index.y < grid_size.y; ++block_index.y) {
      for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) {
        // NaN, and large numbers: what was not written is not to be read.
        const size_t bytes = config.dynamicSmemBytes;
        dynamic_shared = static_cast<char*>(std::malloc(bytes));
        if (bytes > 0) std::memset(dynamic_shared, 0xff, bytes);
        run_block(stacks);
        std::free(dynamic_shared);
      }
    }
  }
}

}  // namespace emulator
