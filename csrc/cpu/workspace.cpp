// The per-thread cache behind Workspace: a few blocks, since a pass over a network holds one while
// its products hold another. Knows nothing of what is stored.
#include "workspace.h"

#include <new>
#include <utility>

namespace fastmlp::cpu {
namespace {

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

char* allocate(size_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t(cache_line))); }
void release(char* data) { ::operator delete(data, std::align_val_t(cache_line)); }

struct Cache {
  Block blocks[2];
  ~Cache() {
    for (Block& block : blocks) release(block.data);
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
    release(smallest->data);
    *smallest = {data_, bytes_};
  } else {
    release(data_);
  }
}

}  // namespace fastmlp::cpu
