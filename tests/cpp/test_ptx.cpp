// The host bodies of csrc/core/cuda/ptx.h: fragment layouts by the formulas of the PTX ISA manual, and copies that arrive no
// earlier than a kernel may count on.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/cuda/ptx.h"

namespace {

using namespace specbranch;
using namespace specbranch::cuda;

const Launch on;

template <typename T>
T item(int i) {  // small integers: every product and sum is exact
  return from_float<T>(static_cast<float>(i * 7 % 13 - 6));
}

// ---- mma.m16n8k16. The manual gives row and column of each item of a lane's fragments; items are packed in pairs.

template <typename T>
__global__ void multiply_fragments(const T* a, const T* b, const float* c, float* out) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, in_group = lane % 4;
  uint32_t a_registers[4] = {}, b_registers[2] = {};
  float c_registers[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a_registers[i / 2] |= static_cast<uint32_t>(a[row * 16 + column].bits) << (16 * (i % 2));
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), column = group;
    b_registers[i / 2] |= static_cast<uint32_t>(b[row * 8 + column].bits) << (16 * (i % 2));
  }
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) c_registers[i] = c[at(i)];
  mma_m16n8k16<T>(c_registers, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) out[at(i)] = c_registers[i];
}

template <typename T>
void check_product() {
  std::vector<T> a(16 * 16), b(16 * 8);
  std::vector<float> c(16 * 8), out(16 * 8, -1.0f);
  for (size_t i = 0; i < a.size(); ++i) a[i] = item<T>(static_cast<int>(i));
  for (size_t i = 0; i < b.size(); ++i) b[i] = item<T>(static_cast<int>(i * i));
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i);
  launch("multiply_fragments", multiply_fragments<T>, on, 1, 32, 0, a.data(), b.data(), c.data(), out.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = c[row * 8 + column];
      for (int k = 0; k < 16; ++k) sum += to_float(a[row * 16 + k]) * to_float(b[k * 8 + column]);
      CHECK_EQUAL(out[row * 8 + column], sum);
    }
  }
}

// ---- ldmatrix: four 8 x 8 matrices, each row at an address of its own.

__global__ void load_matrices(const uint16_t* in, uint32_t* out, bool transposed) {
  uint16_t* memory = shared_memory<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x), place = 31 - lane;  // rows in an order that nobody assumes
  for (int i = 0; i < 8; ++i) memory[place * 8 + i] = in[lane * 8 + i];
  __syncthreads();
  uint32_t items[4];
  if (transposed) {
    ldmatrix_x4_trans(items, shared_address(memory + place * 8));
  } else {
    ldmatrix_x4(items, shared_address(memory + place * 8));
  }
  for (int matrix = 0; matrix < 4; ++matrix) out[matrix * 32 + lane] = items[matrix];
}

// ---- A product by way of shared memory, as attention does it: left factor, and right factor with k down or across.

template <typename T>
__global__ void multiply_tiles(const T* a, const T* b, float* out, bool k_across) {
  T* const left = shared_memory<T>();
  T* const right = left + 16 * 16;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) {
    left[i] = a[i];
    right[k_across ? i % 16 * 16 + i / 16 : i] = b[i];
  }
  __syncthreads();
  uint32_t l[4], r[4];
  ldmatrix_x4(l, shared_address(left + lane % 16 * 16 + lane / 16 * 8));
  if (k_across) {
    ldmatrix_x4(r, shared_address(right + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
  } else {
    ldmatrix_x4_trans(r, shared_address(right + lane % 16 * 16 + lane / 16 * 8));
  }
  for (int half = 0; half < 2; ++half) {
    float c[4] = {};
    const uint32_t columns[2] = {r[2 * half], r[2 * half + 1]};
    mma_m16n8k16<T>(c, l, columns);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = c[i];
  }
}

// ---- Copies.

__global__ void copy_in_groups(const uint32_t* in, uint32_t* out) {
  uint32_t* const memory = shared_memory<uint32_t>() + 12 * threadIdx.x;
  const uint32_t* const from = in + 4 * threadIdx.x;
  uint32_t* report = out + 36 * threadIdx.x;
  const auto tell = [&] {
    for (int i = 0; i < 12; ++i) *report++ = memory[i];
  };
  cp_async_16(shared_address(memory), from, true);
  cp_async_16(shared_address(memory + 4), nullptr, false);
  cp_async_commit();
  cp_async_16(shared_address(memory + 8), from, true);
  cp_async_commit();
  tell();
  cp_async_wait<1>();
  tell();
  cp_async_wait<0>();
  tell();
}

__global__ void copy_without_commit(const uint32_t* in, uint32_t* out) {
  uint32_t* const memory = shared_memory<uint32_t>();
  cp_async_16(shared_address(memory), in, true);
  cp_async_wait<0>();
  *out = memory[0];
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_from(const char* from) {
  cp_async_16(shared_address(shared_memory<char>()), from, true);
  cp_async_commit();
  cp_async_wait<0>();
}

}  // namespace

TEST(mma_multiplies_fragments) {
  check_product<Bfloat16>();
  check_product<Float16>();
}

TEST(ldmatrix_gives_each_lane_its_items) {
  std::vector<uint16_t> in(32 * 8);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(1000 + i);
  std::vector<uint32_t> out(4 * 32);
  for (bool transposed : {false, true}) {
    launch("load_matrices", load_matrices, on, 1, 32, 32 * 16, in.data(), out.data(), transposed);
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) {
          const int along = lane % 4 * 2 + i, across = lane / 4;
          const int row = transposed ? along : across, column = transposed ? across : along;
          CHECK_EQUAL(out[matrix * 32 + lane] >> (16 * i) & 0xFFFFu, in[(8 * matrix + row) * 8 + column]);
        }
      }
    }
  }
}

TEST(tiles_are_multiplied_with_k_down_and_across) {
  std::vector<Bfloat16> a(16 * 16), b(16 * 16);
  std::vector<float> out(16 * 16);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = item<Bfloat16>(static_cast<int>(i * i));
    b[i] = item<Bfloat16>(static_cast<int>(3 * i + 1));
  }
  for (bool k_across : {false, true}) {
    launch("multiply_tiles", multiply_tiles<Bfloat16>, on, 1, 32, 2 * 16 * 16 * 2, a.data(), b.data(), out.data(),
           k_across);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += to_float(a[row * 16 + k]) * to_float(b[k * 16 + column]);
        CHECK_EQUAL(out[row * 16 + column], sum);
      }
    }
  }
}

TEST(copies_arrive_when_waited_for) {
  constexpr int threads = 40;
  alignas(16) uint32_t in[4 * threads];
  for (int i = 0; i < 4 * threads; ++i) in[i] = static_cast<uint32_t>(i + 1);
  std::vector<uint32_t> out(36 * threads);
  launch("copy_in_groups", copy_in_groups, on, 3, threads, threads * 48, in, out.data());
  for (int thread = 0; thread < threads; ++thread) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t *told = &out[36 * thread + i], value = in[4 * thread + i], pending = 0xFFFFFFFFu;
      CHECK_EQUAL(told[0], pending);
      CHECK_EQUAL(told[4], pending);
      CHECK_EQUAL(told[8], pending);
      CHECK_EQUAL(told[12], value);
      CHECK_EQUAL(told[16], 0u);
      CHECK_EQUAL(told[20], pending);
      CHECK_EQUAL(told[24], value);
      CHECK_EQUAL(told[28], 0u);
      CHECK_EQUAL(told[32], value);
    }
  }
}

TEST(a_copy_outside_a_group_is_not_waited_for) {
  alignas(16) uint32_t in[4] = {1, 2, 3, 4};
  uint32_t out = 0;
  launch("copy_without_commit", copy_without_commit, on, 1, 1, 16, in, &out);
  CHECK_EQUAL(out, 0xFFFFFFFFu);
}

TEST(a_misaligned_copy_is_reported) {
  alignas(16) char in[32] = {};
  const auto copy = [&] { launch("copy_from", copy_from, on, 1, 1, 16, in + 2); };
  CHECK_CONTAINS(check::error_of(copy), "cp.async: an address is not a multiple of 16");
}

TEST(floats_are_packed_low_half_first) {
  CHECK_EQUAL(pack<Bfloat16>(1.0f, -2.0f), 0xC0003F80u);
  CHECK_EQUAL(pack<Float16>(1.0f, -2.0f), 0xC0003C00u);
}

TEST(exp2_flushes_small_results) {
  CHECK_EQUAL(exp2_approximate(0.0f), 1.0f);
  CHECK_EQUAL(exp2_approximate(-3.0f), 0.125f);
  CHECK_EQUAL(exp2_approximate(-126.0f), std::ldexp(1.0f, -126));
  CHECK_EQUAL(exp2_approximate(-126.5f), 0.0f);
  CHECK_EQUAL(exp2_approximate(-INFINITY), 0.0f);
  CHECK(std::isnan(exp2_approximate(NAN)));
}

int main(int argc, char** argv) { return check::main(argc, argv); }
