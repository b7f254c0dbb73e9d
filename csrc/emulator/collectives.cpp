// Warp collectives: what the lane that comes last does for all.
#include <cstring>
#include <string>

#include "cuda.h"
#include "worker.h"

namespace specbranch::emulator {

void warp_exchange(unsigned mask, const void* mine, size_t bytes, void* all, Site site) {
  struct Part : Request {
    const unsigned char* mine;
    unsigned char* all;
    size_t bytes;
    Part(unsigned mask, Site site, Complete complete, const void* mine, void* all, size_t bytes)
        : Request("warp_exchange", mask, site, complete),
          mine(static_cast<const unsigned char*>(mine)),
          all(static_cast<unsigned char*>(all)),
          bytes(bytes) {}
  };
  Part part(
      mask, site,
      [](Request* const* requests, unsigned lanes) {
        for (int to = 0; to < lanes_per_warp; ++to) {
          if (!(lanes >> to & 1u)) continue;
          const Part& receiver = *static_cast<Part*>(requests[to]);
          for (int from = 0; from < lanes_per_warp; ++from) {
            unsigned char* place = receiver.all + from * receiver.bytes;
            if (lanes >> from & 1u) {
              std::memcpy(place, static_cast<Part*>(requests[from])->mine, receiver.bytes);
            } else {
              std::memset(place, 0, receiver.bytes);
            }
          }
        }
      },
      mine, all, bytes);
  warp_collective(part);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, unsigned operand, int width, Site site) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* const name = names[static_cast<int>(kind)];
  if (width < 1 || width > lanes_per_warp || (width & (width - 1)) != 0) {
    report(std::string(name) + ": width " + std::to_string(width) + " is not a power of two up to 32", site);
  }
  const int me = current(name).lane(), first = me & ~(width - 1);
  int source = me;
  switch (kind) {
    case Shuffle::index: source = first + static_cast<int>(operand & static_cast<unsigned>(width - 1)); break;
    case Shuffle::up:
      if (operand <= static_cast<unsigned>(me - first)) source = me - static_cast<int>(operand);
      break;
    case Shuffle::down:
      if (operand < static_cast<unsigned>(first + width - me)) source = me + static_cast<int>(operand);
      break;
    case Shuffle::exclusive_or: {
      const unsigned other = static_cast<unsigned>(me) ^ operand;
      if (other < static_cast<unsigned>(first + width)) source = static_cast<int>(other);
      break;
    }
  }
  if ((mask >> me & 1u) && !(mask >> source & 1u)) {
    report(std::string(name) + ": source lane " + std::to_string(source) + " is not in mask " + hexadecimal(mask),
           site);
  }
  struct Part : Request {
    uint64_t bits, result;
    int source;
    Part(const char* what, unsigned mask, Site site, Complete complete, uint64_t bits, int source)
        : Request(what, mask, site, complete), bits(bits), result(0), source(source) {}
  };
  Part part(
      name, mask, site,
      [](Request* const* requests, unsigned lanes) {
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
          Part& receiver = *static_cast<Part*>(requests[__builtin_ctz(rest)]);
          receiver.result = static_cast<Part*>(requests[receiver.source])->bits;
        }
      },
      bits, source);
  warp_collective(part);
  return part.result;
}

void sync_warp(unsigned mask, Site site) {
  Request request("__syncwarp", mask, site, [](Request* const*, unsigned) {});
  warp_collective(request);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  struct Part : Request {
    unsigned result;
    Part(unsigned mask, Site site, Complete complete, bool predicate)
        : Request("a vote", mask, site, complete), result(predicate) {}
  };
  Part part(
      mask, site,
      [](Request* const* requests, unsigned lanes) {
        unsigned votes = 0;
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
          const int l = __builtin_ctz(rest);
          votes |= static_cast<Part*>(requests[l])->result << l;
        }
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
          static_cast<Part*>(requests[__builtin_ctz(rest)])->result = votes;
        }
      },
      predicate);
  warp_collective(part);
  return part.result;
}

}  // namespace specbranch::emulator
