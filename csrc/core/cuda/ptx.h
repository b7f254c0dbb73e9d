// Instructions that CUDA C++ has no name for, each with a host body for the emulator. All exist since compute
// capability 8.0.
//
// The host bodies follow the fragment layouts of the PTX ISA manual (sections on mma.m16n8k16 and ldmatrix), and an
// asynchronous copy arrives no earlier than the wait that guarantees it: until then its place holds NaN.
#pragma once

#include <type_traits>

#include "core/cuda/device.h"

#ifdef SPECBRANCH_EMULATED
#include <map>
#include <utility>
#include <vector>
#endif

namespace specbranch::cuda {

// An address in shared memory as the instructions take it; integers (bytes) can be added.
#ifdef SPECBRANCH_EMULATED
using SharedAddress = char*;
inline SharedAddress shared_address(void* p) { return static_cast<char*>(p); }
#else
using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// ---- Asynchronous copies. A thread that starts some must wait for all of them before it ends.

#ifdef SPECBRANCH_EMULATED
namespace host {

struct PendingCopies {
  struct Copy {
    char* to;
    const void* from;
    int64_t group;
  };
  std::vector<Copy> copies;
  int64_t open_group = 0;
  decltype(emulator::thread_serial()) serial = 0;

  // Those of the running CUDA thread: resident blocks differ in the address of their shared memory.
  static PendingCopies& mine() {
    static thread_local std::map<std::pair<const void*, unsigned>, PendingCopies> all;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    PendingCopies& pending = all[{emulator::shared_memory(), thread}];
    // What a kernel that failed has left behind at the same place is not this thread's.
    if (pending.serial != emulator::thread_serial()) pending = {{}, 0, emulator::thread_serial()};
    return pending;
  }

  void finish(int64_t before_group) {
    size_t kept = 0;
    for (const Copy& copy : copies) {
      if (copy.group >= before_group) {
        copies[kept++] = copy;
        continue;
      }
      if (copy.from != nullptr) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    copies.resize(kept);
  }
};

}  // namespace host
#endif

// Starts to copy 16 bytes of global memory; to write zeros when they are not `present`: `from` is not read then. Both
// addresses are multiples of 16.
__device__ inline void cp_async_16(SharedAddress to, const void* from, bool present) {
#ifdef SPECBRANCH_EMULATED
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (present && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    emulator::report("cp.async: an address is not a multiple of 16", {__FILE__, __LINE__});
  }
  host::PendingCopies& pending = host::PendingCopies::mine();
  memset(to, 0xFF, 16);
  pending.copies.push_back({to, present ? from : nullptr, pending.open_group});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ inline void cp_async_commit() {
#ifdef SPECBRANCH_EMULATED
  ++host::PendingCopies::mine().open_group;
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits for the calling thread's groups but the latest `groups`. Others see the copies after a barrier.
template <int groups>
__device__ inline void cp_async_wait() {
#ifdef SPECBRANCH_EMULATED
  host::PendingCopies& pending = host::PendingCopies::mine();
  pending.finish(pending.open_group - groups);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
#endif
}

// ---- Loads.

// Four floats of global memory, or zeros when they are not `present`: `from` is not read then. Without a branch, so
// that many can be on their way at once.
__device__ inline float4 load_present(const float* from, bool present) {
#ifdef SPECBRANCH_EMULATED
  return present ? *reinterpret_cast<const float4*>(from) : float4{};
#else
  float4 v;
  asm volatile(
      "{\n.reg .pred present;\nsetp.ne.b32 present, %5, 0;\nmov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\n"
      "mov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;\n@present ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&f"(v.x), "=&f"(v.y), "=&f"(v.z), "=&f"(v.w)
      : "l"(from), "r"(static_cast<int>(present))
      : "memory");
  return v;
#endif
}

// ---- Matrices of 8 x 8 16-bit items from shared memory.

#ifdef SPECBRANCH_EMULATED
namespace host {

struct FourMatrices {
  uint32_t items[4];
};

// Lane l gives the address of row l % 8 of matrix l / 8 and gets items 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each
// matrix, or of column l / 4 when transposed.
inline FourMatrices ldmatrix(SharedAddress row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    emulator::report("ldmatrix: an address is not a multiple of 16", {__FILE__, __LINE__});
  }
  return emulator::warp_compute<FourMatrices>(
      all_lanes, row,
      [transposed](const SharedAddress(&rows)[32], FourMatrices(&out)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t pair = 0;
            for (int i = 0; i < 2; ++i) {
              const int along = 2 * (lane % 4) + i, across = lane / 4;
              const char* from = rows[8 * matrix + (transposed ? along : across)] + 2 * (transposed ? across : along);
              uint16_t item;
              memcpy(&item, from, sizeof item);
              pair |= static_cast<uint32_t>(item) << (16 * i);
            }
            out[lane].items[matrix] = pair;
          }
        }
      },
      {__FILE__, __LINE__});
}

}  // namespace host
#endif

__device__ inline void ldmatrix_x4(uint32_t (&items)[4], SharedAddress row) {
#ifdef SPECBRANCH_EMULATED
  memcpy(items, host::ldmatrix(row, false).items, sizeof items);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(items[0]), "=r"(items[1]), "=r"(items[2]), "=r"(items[3])
               : "r"(row)
               : "memory");
#endif
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&items)[4], SharedAddress row) {
#ifdef SPECBRANCH_EMULATED
  memcpy(items, host::ldmatrix(row, true).items, sizeof items);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(items[0]), "=r"(items[1]), "=r"(items[2]), "=r"(items[3])
               : "r"(row)
               : "memory");
#endif
}

// ---- Matrix products.

#ifdef SPECBRANCH_EMULATED
namespace host {

struct Operands {
  float c[4];
  uint32_t a[4], b[2];
};
struct Product {
  float c[4];
};

// With g = lane / 4 and t = lane % 4: register r of a holds A[g + 8 (r % 2)][2 t + 8 (r / 2) + {0, 1}], register r of b
// holds B[2 t + 8 r + {0, 1}][g], and element i of c is C[g + 8 (i / 2)][2 t + i % 2].
template <typename T>
void multiply(const Operands (&in)[32], Product (&out)[32]) {
  float a[16][16], b[16][8];
  const auto item = [](uint32_t pair, int i) { return to_float(T{static_cast<uint16_t>(pair >> (16 * i))}); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + i] = item(in[lane].a[r], i);
      for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + i][g] = item(in[lane].b[r], i);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      const int lane = row % 8 * 4 + column / 2, i = row / 8 * 2 + column % 2;
      out[lane].c[i] = in[lane].c[i] + sums[column];
    }
  }
}

}  // namespace host
#endif

// c += a b for a 16 x 16 and b 16 x 8 of T (Bfloat16 or Float16) and c in float32, spread over the warp.
template <typename T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef SPECBRANCH_EMULATED
  const host::Operands mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const host::Product product =
      emulator::warp_compute<host::Product>(all_lanes, mine, host::multiply<T>, {__FILE__, __LINE__});
  memcpy(c, product.c, sizeof c);
#else
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// ---- Registers.

// threadIdx.x, read anew: what is computed from it need not stay in registers from one turn of a loop to the next.
__device__ inline int thread_again() {
#ifdef SPECBRANCH_EMULATED
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  __builtin_assume(thread >= 0);  // so that dividing it takes one instruction
  return thread;
#endif
}

// The same for what lies in memory.
template <typename T>
__device__ inline T read_again(const T& x) {
  return *static_cast<const volatile T*>(&x);
}

// ---- Arithmetic.

// Two floats as T, round to nearest: `low` in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
#ifdef SPECBRANCH_EMULATED
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
#else
  uint32_t pair;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#endif
}

// 2^x to 2^-22 relative; results below 2^-126 become 0.
__device__ inline float exp2_approximate(float x) {
#ifdef SPECBRANCH_EMULATED
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace specbranch::cuda
