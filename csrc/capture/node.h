// A step of a tape that no operator of torch computes: several operations of the recorded function at once, by kernels
// of ours. Made in csrc/python/capture_nodes.cpp, run by tape.cpp. Reads and writes tensors of the tape, whose memory
// may be another one at each replay, and must not keep pointers into it.
#pragma once

namespace fastmlp {

class Node {
 public:
  Node() = default;
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  virtual ~Node() = default;

  // Runs in the thread that replays, without the GIL.
  virtual void run() = 0;
  // For reports: "elementwise".
  virtual const char* name() const = 0;
};

}  // namespace fastmlp
