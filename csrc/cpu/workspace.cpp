// The cache of each thread behind Workspace. It has two blocks, because a pass over a network holds one while its
// products hold another. Knows nothing of what is stored.
#include "workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>
#include <utility>

namespace fastmlp::cpu {
namespace {

constexpr size_t huge_page = size_t(2) << 20;
// Smaller blocks are left alone, because they mostly come from memory that the process has used before.
constexpr size_t large_block = 2 * huge_page;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes < large_block ? cache_line : huge_page); }
char* allocate(size_t bytes) {
  char* const data = static_cast<char*>(::operator new(bytes, alignment(bytes)));
  prefer_huge_pages(data, bytes);
  return data;
}
void release(const Block& block) { ::operator delete(block.data, alignment(block.bytes)); }

struct Cache {
  Block blocks[2];
  ~Cache() {
    for (const Block& block : blocks) release(block);
  }
};

thread_local Cache cache;

}  // namespace

Workspace::Workspace(size_t bytes) {
  if (bytes == 0) return;
  for (Block& block : cache.blocks) {
    if (block.bytes >= bytes) {
      data_ = std::exchange(block.data, nullptr);
      bytes_ = std::exchange(block.bytes, 0);
      return;
    }
  }
  data_ = allocate(bytes);
  bytes_ = bytes;
}

Workspace::~Workspace() {
  size_t kept = bytes_;
  Block* smallest = &cache.blocks[0];
  for (Block& block : cache.blocks) {
    kept += block.bytes;
    if (block.bytes < smallest->bytes) smallest = &block;
  }
  if (bytes_ > smallest->bytes && kept - smallest->bytes <= workspace_kept_bytes) {
    release(*smallest);
    *smallest = {data_, bytes_};
  } else {
    release({data_, bytes_});
  }
}

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  if (bytes < large_block) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge_page * huge_page;
  // This is advice, so that its result does not matter: where it is refused, pages are small.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastmlp::cpu
