// What a kernel does wrong, in words.
#include <cstdio>

#include "worker.h"

namespace specbranch::emulator {

std::string text_of(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text_of(Site site) { return site.line == 0 ? site.file : site.file + (":" + std::to_string(site.line)); }

std::string hexadecimal(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// A message is made before the stack is left for good, in functions that return.

__attribute__((noinline)) void Worker::set_error(const std::string& what) {
  error_ = std::string(grid_->name) + ": block " + text_of(block_->index) + ", " + thread_text(thread_) + ": " + what;
}

void Worker::fail(std::string what, Site site) {
  set_error(what + " at " + text_of(site));
  std::string().swap(what);  // nobody destroys it
  leave();
}

__attribute__((noinline)) void Worker::explain_divergence(Site site) {
  int other = 0;
  while (!(block_->warps[other / lanes_per_warp].at_barrier >> (other % lanes_per_warp) & 1u)) ++other;
  set_error("divergent __syncthreads at " + text_of(site) + ": " + thread_text(other) + " waits at " +
            text_of(block_->barrier_site));
}

// Why the thread cannot go on, or "" when it does not wait for a missing lane.
std::string Worker::explain_wait(int thread) const {
  const Warp& warp = block_->warps[thread / lanes_per_warp];
  const int first = thread / lanes_per_warp * lanes_per_warp;
  if (!(warp.in_collective >> (thread - first) & 1u)) return "";
  const Request& request = *warp.requests[thread - first];
  const std::string what =
      std::string(request.what) + " with mask " + hexadecimal(request.mask) + " at " + text_of(request.site);
  for (uint32_t rest = request.mask; rest != 0; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const std::string waits = what + " waits for lane " + std::to_string(l) + ", ";
    if (!(warp.exists >> l & 1u)) return waits + "which the block does not have";
    if (warp.exited >> l & 1u) return waits + "which has exited";
    if (warp.at_barrier >> l & 1u) return waits + "which waits in __syncthreads at " + text_of(block_->barrier_site);
    const Request& other = *warp.requests[l];
    if (!same_collective(request, other)) {
      return waits + "which waits in " + other.what + " with mask " + hexadecimal(other.mask) + " at " +
             text_of(other.site);
    }
  }
  return "";
}

__attribute__((noinline)) void Worker::explain_deadlock() {
  for (int i = 0; i < grid_->block_threads; ++i) {
    const std::string why = explain_wait(i);
    if (why.empty()) continue;
    thread_ = i;
    return set_error(why);
  }
  // Only __syncthreads is left, and threads that it waits for and that are gone.
  int waiting = -1, exited = -1;
  for (int i = 0; i < grid_->block_threads; ++i) {
    const Warp& warp = block_->warps[i / lanes_per_warp];
    if (waiting < 0 && (warp.at_barrier >> (i % lanes_per_warp) & 1u)) waiting = i;
    if (exited < 0 && (warp.exited >> (i % lanes_per_warp) & 1u)) exited = i;
  }
  thread_ = waiting;
  set_error("__syncthreads at " + text_of(block_->barrier_site) + " waits for " + thread_text(exited) +
            ", which has exited");
}

}  // namespace specbranch::emulator
