// CUDA's events on the emulator, for tests of code that measures time. Part of emulator.h. Two clocks run: the host's,
// which goes on with every call, and the device's, which works off what was queued. Kernels run at once all the same;
// what each call takes is set by the test, and what was called is recorded.
#pragma once

#include <algorithm>

namespace emulator {

// Microseconds that a call keeps the host, and then the device.
struct Duration {
  double host = 0, device = 0;
};

struct Timeline {
  double host = 0, device = 0;  // now, and when the device has done all that was queued
  Duration launch{1, 1};        // of any kernel
  std::vector<std::string> calls;

  void queue(const char* call, const Duration& duration) {
    calls.push_back(call);
    host += duration.host;
    device = std::max(device, host) + duration.device;
  }
};
inline Timeline timeline;

struct Event {
  double time = 0;
};

}  // namespace emulator

using cudaStream_t = void*;
using cudaEvent_t = emulator::Event*;
enum cudaError_t { cudaSuccess, cudaErrorNotReady };

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new emulator::Event();
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  emulator::timeline.queue("record", {});
  event->time = emulator::timeline.device;
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->time <= emulator::timeline.host ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  emulator::timeline.calls.push_back("wait");
  emulator::timeline.host = std::max(emulator::timeline.host, event->time);
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = float((end->time - begin->time) / 1000);
  return cudaSuccess;
}
