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

// Where a function that gave way goes on. swapcontext() asks the kernel at each switch, of which a
// problem has millions. Two functions, as the compiler asks for, of which their callers
// assume nothing: all registers are others afterwards. A sanitizer would take the one that never
// returns for the end of the stack.
struct Place {
  void* registers[5];

  __attribute__((noinline, noipa, noreturn, no_sanitize("address"))) void go_on() {
    __builtin_longjmp(registers, 1);
  }
  __attribute__((noinline, noipa, no_sanitize("address"))) void leave_for(Place& other) {
    if (__builtin_setjmp(registers) == 0) other.go_on();
  }
};

struct Thread {
  Place place;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

std::vector<Thread> pool;  // which are used again by every block
size_t size;               // of the block
std::vector<Meeting> warps;
Meeting block;
size_t current;
int running;
Place outside;
const std::function<void()>* body;

// Lets the next thread run, or whoever started the block if all are done.
void give_way() {
  const size_t own = current;
  if (running == 0) {
    pool[own].place.leave_for(outside);
    return;
  }
  do {
    current = current + 1 < size ? current + 1 : 0;
  } while (pool[current].done);
  thread_index.x = static_cast<unsigned>(current);
  if (own != current) pool[own].place.leave_for(pool[current].place);
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

// One of the pool, which waits here for the next block.
void run_thread() {
  pool.back().place.leave_for(outside);
  while (true) {
    (*body)();
    pool[current].done = true;
    --running;
    for (Meeting* meeting : {&warps[thread_index.x / 32], &block}) {
      --meeting->members;
      meeting->close_if_all_are_here();
    }
    give_way();
  }
}

void add_thread() {
  pool.push_back({.stack = std::unique_ptr<char[]>(new char[kStackBytes])});
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = pool.back().stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_thread, 0);
  if (__builtin_setjmp(outside.registers) == 0) setcontext(&context);
}

void run_block() {
  warps.assign((size + 31) / 32, {});
  block = {};
  running = block.members = static_cast<int>(size);
  for (size_t i = 0; i < size; ++i) {
    pool[i].done = false;
    ++warps[i / 32].members;
  }
  current = 0;
  thread_index = {0, 0, 0};
  outside.leave_for(pool[0].place);
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
  size = block_size.x;
  while (pool.size() < size) add_thread();
  for (block_index.z = 0; block_index.z < grid_size.z; ++block_index.z) {
    for (block_index.y = 0; block_index.y < grid_size.y; ++block_index.y) {
      for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) {
        // NaN, and large numbers: what was not written is not to be read.
        const size_t bytes = config.dynamicSmemBytes;
        dynamic_shared = static_cast<char*>(std::malloc(bytes));
        if (bytes > 0) std::memset(dynamic_shared, 0xff, bytes);
        run_block();
        std::free(dynamic_shared);
      }
    }
  }
}

}  // namespace emulator
