// Shared memory and the launch of a kernel, block after block. Part of emulator.h.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <mutex>

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
inline void poison(void* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
inline void unpoison(void* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

// NaN in every dtype, with a red zone behind it. Aligned as asked and not better, so that what needs more shows.
inline void* take_shared(size_t bytes, size_t alignment) {
  const size_t at = (block->used + 2 * alignment - 1) / (2 * alignment) * 2 * alignment + alignment;
  unsigned char* const data = block->arena + at;
  block->used = at + bytes + redzone_bytes;
  unpoison(data, bytes);
  std::memset(data, 0xff, bytes);
  return data;
}

inline void* shared_object(const void* key, size_t bytes, size_t alignment) {
  const Unseen unseen;
  for (const SharedObject& object : block->objects) {
    if (object.key == key) return object.data;
  }
  block->static_bytes += bytes;
  if (block->static_bytes > static_shared_limit) fail("more than 48 KiB of static shared memory");
  if (block->static_bytes + block->dynamic_bytes > shared_limit)
    fail("more than " + std::to_string(shared_limit >> 10) + " KiB of shared memory");
  block->objects.push_back({key, take_shared(bytes, alignment)});
  return block->objects.back().data;
}

inline bool is_shared(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  return byte >= block->arena && byte < block->arena + block->used;
}

inline char* map_memory(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for the stacks of an emulated block");
  return static_cast<char*>(p);
}

// Stacks and shared memory, kept from block to block and launch to launch.
struct Memory {
  std::vector<char*> stacks;
  char* arena = nullptr;

  void prepare(size_t fibers) {
#if defined(__SANITIZE_THREAD__)
    // New mappings, so that ThreadSanitizer forgets what the block before did to the old ones.
    for (char* stack : stacks) munmap(stack, stack_bytes);
    stacks.clear();
    if (arena) munmap(arena, arena_bytes);
    arena = nullptr;
#endif
    if (!arena) arena = map_memory(arena_bytes);
    while (stacks.size() < fibers) {
      stacks.push_back(map_memory(stack_bytes));
      mprotect(stacks.back(), page_bytes, PROT_NONE);
    }
  }
};

// One kernel launch. Fibers of earlier blocks are destroyed late under ThreadSanitizer: a thread id taken again would
// hide races between neighbouring blocks.
class Launch {
 public:
  Launch(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> body) {
    const size_t count = size_t(threads.x) * threads.y * threads.z;
    if (count == 0 || count > 1024 || count % warp_size != 0 || threads.z > 64)
      throw Error("invalid launch: " + std::to_string(count) + " threads a block");
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
      throw Error("invalid launch: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                  std::to_string(grid.z));
    if (shared_bytes > shared_limit)
      throw Error("invalid launch: more than " + std::to_string(shared_limit >> 10) + " KiB of shared memory");
    block = &block_;
    current = &block_.main;
    gridDim = grid;
    blockDim = threads;
    block_.body = std::move(body);
    block_.dynamic_bytes = shared_bytes;
    block_.fibers.resize(count);
    block_.slots.resize(count);
    if (order == Order::random) block_.random.seed(seed);
#if defined(__SANITIZE_THREAD__)
    block_.main.thread_sanitizer = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* low = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &low, &block_.main.stack_size);
    pthread_attr_destroy(&attributes);
    block_.main.stack = static_cast<char*>(low);
#endif
  }

  ~Launch() {
#if defined(__SANITIZE_THREAD__)
    for (void* fiber : finished_) __tsan_destroy_fiber(fiber);
    __tsan_acquire(&block_.main);
#endif
    if (block_.arena) unpoison(block_.arena, arena_bytes);
    block = nullptr;
    current = nullptr;
  }

  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  void run() {
    for (unsigned z = 0; z < gridDim.z; z++) {
      for (unsigned y = 0; y < gridDim.y; y++) {
        for (unsigned x = 0; x < gridDim.x; x++) run_block(dim3(x, y, z));
      }
    }
  }

 private:
  void run_block(dim3 index) {
    const Unseen unseen;
    static Memory memory;
    memory.prepare(block_.fibers.size());
    blockIdx = index;
    block_.arena = reinterpret_cast<unsigned char*>(memory.arena);
    poison(block_.arena, arena_bytes);
    block_.used = block_.static_bytes = 0;
    block_.objects.clear();
    block_.ready.clear();
    block_.at_barrier = 0;
    block_.live = int(block_.fibers.size());
    block_.dynamic = block_.dynamic_bytes > 0 ? take_shared(block_.dynamic_bytes, 128) : nullptr;
    for (size_t t = 0; t < block_.fibers.size(); t++) start_fiber(t, memory.stacks[t]);
    switch_to(next());
#if defined(__SANITIZE_THREAD__)
    for (const Fiber& fiber : block_.fibers) finished_.push_back(fiber.thread_sanitizer);
    if (finished_.size() > 1500) {
      for (void* fiber : finished_) __tsan_destroy_fiber(fiber);
      finished_.clear();
    }
#endif
    if (block_.error.empty() && block_.live > 0) block_.error = deadlock();
    if (!block_.error.empty()) throw Error(block_.error);
    profile.end_block();
  }

  void start_fiber(size_t number, char* stack) {
    Fiber& fiber = block_.fibers[number];
    fiber = Fiber();
    const unsigned t = unsigned(number);
    fiber.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    fiber.lane = int(t) % warp_size;
    fiber.warp = int(t) / warp_size;
    fiber.stack = stack;
    unpoison(stack + page_bytes, stack_bytes - page_bytes);
    // As if fastmlp_switch_stack had been called at the start of run_fiber: six registers and where to return to.
    void** top = reinterpret_cast<void**>(stack + stack_bytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&run_fiber);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
    fiber.thread_sanitizer = __tsan_create_fiber(0);
#endif
    make_ready(fiber);
  }

  std::string deadlock() const {
    int at_barrier = 0, barrier_line = 0, at_warp = 0, warp_line = 0;
    for (const Fiber& fiber : block_.fibers) {
      if (fiber.state == State::at_barrier) {
        at_barrier++;
        barrier_line = fiber.line;
      } else if (fiber.state == State::at_warp) {
        at_warp++;
        warp_line = fiber.line;
      }
    }
    return "deadlock: " + std::to_string(at_barrier) + " threads wait at __syncthreads (line " +
           std::to_string(barrier_line) + "), " + std::to_string(at_warp) + " at a warp function (line " +
           std::to_string(warp_line) + "), " + std::to_string(int(block_.fibers.size()) - block_.live) + " have exited";
  }

  Block block_;
  std::vector<void*> finished_;
};

}  // namespace emulator

namespace fastmlp::cuda {

template <class T> T& shared() {
  static char key;
  return *static_cast<T*>(emulator::shared_object(&key, sizeof(T), shared_alignment<T>));
}

template <class T> T* dynamic_shared() { return static_cast<T*>(emulator::block->dynamic); }

}  // namespace fastmlp::cuda

namespace emulator {

// For tests of what a library does then: so many launches from now one is refused, as a driver may; negative: none.
inline int launches_before_failure = -1;
inline constexpr const char* refusal = "the emulator was told to refuse this launch";

}  // namespace emulator

namespace fastmlp::cuda {

// For tests of what a library does then: whether there is code for the device.
inline bool has_code = true;
template <class... P> const char* missing_code(void (*)(P...)) { return has_code ? nullptr : no_code; }

// Null, or that it was refused; what goes wrong in a kernel is thrown.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, const A&... a) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (emulator::launches_before_failure >= 0 && emulator::launches_before_failure-- == 0) return emulator::refusal;
  emulator::timeline.queue("launch", emulator::timeline.launch);
  if (const char* order = std::getenv("FASTMLP_EMULATOR_ORDER")) emulator::set_order(order);
  if (emulator::route == 0) {
    emulator::Launch(grid, block, shared_bytes, [&] { kernel(P(a)...); }).run();
    return nullptr;
  }
  std::string name;
  const auto translated = emulator::translation_of(reinterpret_cast<const void*>(kernel), name);
  const auto start = [&](P... parameters) {
    const void* const addresses[] = {&parameters...};
    emulator::profile.begin(name);
    emulator::executed.insert(name);
    emulator::Launch(grid, block, shared_bytes, [&] { translated(addresses); }).run();
  };
  start(P(a)...);
  return nullptr;
}

}  // namespace fastmlp::cuda
