// Fibers: the threads of one block, their switching, barriers and warp functions. Part of emulator.h; launch.h makes
// them. A fiber runs until it waits; who waits is put into `ready` when what it waits for has come.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int warp_size = 32;
constexpr size_t page_bytes = 4096;
constexpr size_t stack_bytes = 256 << 10;
constexpr size_t static_shared_limit = 48 << 10;
// With dynamic shared memory: 64 KiB on sm_75, 99 on sm_86, 89 and 120, and so on all from sm_80 on.
inline size_t shared_limit = 99 << 10;
constexpr size_t redzone_bytes = 64;
constexpr size_t arena_bytes = 512 << 10;

enum class State { ready, at_barrier, at_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_size = stack_bytes;
  State state = State::ready;
  int line = 0;  // where it waits
  dim3 index;
  int lane = 0, warp = 0;
  bool phase = false;                     // of its warp functions, for ThreadSanitizer
  std::vector<Copy> open;                 // asynchronous copies of no group yet
  std::vector<std::vector<Copy>> groups;  // those on their way, oldest first
  void* address_sanitizer = nullptr;
  void* thread_sanitizer = nullptr;
};

// What a lane gives to a warp function and gets from it.
struct Slot {
  alignas(16) unsigned char bytes[64];
};

struct SharedObject {
  const void* key;
  void* data;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots;
  std::vector<int> ready;
  int live = 0, at_barrier = 0, barrier_line = 0;
  unsigned barriers = 0;
  unsigned char* arena = nullptr;  // shared memory
  size_t used = 0, static_bytes = 0, dynamic_bytes = 0;
  void* dynamic = nullptr;
  std::vector<SharedObject> objects;
  Fiber main;  // the caller of launch
  std::function<void()> body;
  std::string error;
  std::mt19937 random;
};

inline Block* block = nullptr;    // that runs now
inline Fiber* current = nullptr;  // the fiber of it that runs now

enum class Order { fifo, lifo, random };
inline Order order = Order::fifo;
inline unsigned seed = 0;

inline void set_order(const std::string& name) {
  order = name == "fifo" ? Order::fifo : name == "lifo" ? Order::lifo : Order::random;
  if (order == Order::random) seed = unsigned(std::stoul(name));
}

// ThreadSanitizer looks away: the emulator's own books are not part of the program under test.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
#else
  Unseen() {}
#endif
};

inline void release(void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
  (void)p;
}
inline void acquire(void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
  (void)p;
}

// Addresses that stand for synchronisations, two of each kind taken in turns: they lie where no thread writes.
inline void* barrier_mark(unsigned turn) { return block->arena + arena_bytes - 8 + turn % 2; }
inline void* warp_mark(int warp, bool phase) { return block->arena + arena_bytes - 128 + 2 * warp + (phase ? 1 : 0); }

[[noreturn]] inline void fail(const std::string& message) {
  const auto text = [](const dim3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
  };
  throw Error(message + " [block " + text(blockIdx) + ", thread " + text(current->index) + "]");
}

// Saves the callee-saved registers and the stack pointer, and takes up another stack.
extern "C" void fastmlp_switch_stack(void** save, void* load);
asm(R"(
.text
.weak fastmlp_switch_stack
.type fastmlp_switch_stack, @function
fastmlp_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastmlp_switch_stack, . - fastmlp_switch_stack
)");

#if defined(__SANITIZE_THREAD__)
__attribute__((noinline, no_sanitize("thread")))
#else
__attribute__((noinline))
#endif
inline void switch_to(Fiber* to, bool for_good = false) {
  Fiber* const from = current;
  current = to;
  threadIdx = to->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from->address_sanitizer, to->stack, to->stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  fastmlp_switch_stack(&from->stack_pointer, to->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->address_sanitizer, nullptr, nullptr);
#endif
  (void)for_good;
}

inline void make_ready(Fiber& fiber) {
  fiber.state = State::ready;
  block->ready.push_back(int(&fiber - block->fibers.data()));
}

// The next fiber to run; the caller of launch if there is none, or after an error.
inline Fiber* next() {
  std::vector<int>& ready = block->ready;
  if (!block->error.empty() || ready.empty()) return &block->main;
  const size_t at = order == Order::fifo ? 0 : order == Order::lifo ? ready.size() - 1 : block->random() % ready.size();
  Fiber* const fiber = &block->fibers[ready[at]];
  ready.erase(ready.begin() + std::ptrdiff_t(at));
  return fiber;
}

inline void pause() {
  Fiber* const other = next();
  if (other != current) switch_to(other);
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  try {
    block->body();
    const Unseen unseen;
    for (const auto& group : current->groups) {
      if (!group.empty()) fail("a thread exits while its asynchronous copies are pending");
    }
    if (!current->open.empty()) fail("a thread exits while its asynchronous copies are pending");
  } catch (const std::exception& error) {
    const Unseen unseen;
    if (block->error.empty()) block->error = error.what();
  }
  release(&block->main);
  Fiber* other = nullptr;
  {
    const Unseen unseen;
    current->state = State::done;
    block->live--;
    other = next();
  }
  switch_to(other, true);
  std::abort();  // never reached: nothing switches to a fiber that is done
}

inline void synchronise_block(int line) {
  const Unseen unseen;
  if (block->live != int(block->fibers.size()))
    fail("__syncthreads in line " + std::to_string(line) + " after another thread has exited");
  if (block->at_barrier > 0 && block->barrier_line != line)
    fail("diverging barriers: __syncthreads of lines " + std::to_string(block->barrier_line) + " and " +
         std::to_string(line) + " meet");
  void* const mark = barrier_mark(block->barriers);
  release(mark);
  block->barrier_line = current->line = line;
  current->state = State::at_barrier;
  if (++block->at_barrier == block->live) {
    block->at_barrier = 0;
    block->barriers++;
    for (Fiber& fiber : block->fibers) make_ready(fiber);
  }
  pause();
  acquire(mark);
}

// Waits for the whole warp; the lane that comes last calls `meet` before any goes on.
template <class Meet> void synchronise_warp(int line, const Meet& meet) {
  void* mark = nullptr;
  bool last = true;
  {
    const Unseen unseen;
    mark = warp_mark(current->warp, current->phase ^= true);
    release(mark);
    current->line = line;
    current->state = State::at_warp;
    Fiber* const warp = &block->fibers[size_t(current->warp) * warp_size];
    for (int lane = 0; lane < warp_size; lane++) {
      last &= warp[lane].state == State::at_warp;
      if (warp[lane].state == State::at_warp && warp[lane].line != line)
        fail("a warp diverges: warp functions of lines " + std::to_string(warp[lane].line) + " and " +
             std::to_string(line) + " meet");
    }
    if (last) acquire(mark);
  }
  if (last) meet();
  {
    const Unseen unseen;
    if (last) {
      Fiber* const warp = &block->fibers[size_t(current->warp) * warp_size];
      release(mark);
      for (int lane = 0; lane < warp_size; lane++) make_ready(warp[lane]);
    }
    pause();
    acquire(mark);
  }
}

// What `combine(lane, given)` returns for the calling lane, where given(l) is what lane l gave.
template <class Result, class Given, class Combine>
Result exchange(const Given& value, int line, const Combine& combine) {
  static_assert(sizeof(Given) <= sizeof(Slot) && sizeof(Result) <= sizeof(Slot));
  Slot* const slots = &block->slots[size_t(current->warp) * warp_size];
  {
    const Unseen unseen;
    std::memcpy(slots[current->lane].bytes, &value, sizeof value);
  }
  synchronise_warp(line, [&] {
    Given given[warp_size];
    Result results[warp_size];
    {
      const Unseen unseen;
      for (int lane = 0; lane < warp_size; lane++) std::memcpy(&given[lane], slots[lane].bytes, sizeof(Given));
    }
    for (int lane = 0; lane < warp_size; lane++) results[lane] = combine(lane, given);
    const Unseen unseen;
    for (int lane = 0; lane < warp_size; lane++) std::memcpy(slots[lane].bytes, &results[lane], sizeof(Result));
  });
  const Unseen unseen;
  Result result;
  std::memcpy(&result, slots[current->lane].bytes, sizeof result);
  return result;
}

}  // namespace emulator
