// CUDA's built-in types, with their alignment: the undefined-behaviour sanitizer then reports a misaligned access.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) noexcept : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

#define SPECBRANCH_EMULATOR_VECTORS(type, name) \
  struct alignas(8) name##2 { type x, y; };     \
  struct alignas(16) name##4 { type x, y, z, w; };
SPECBRANCH_EMULATOR_VECTORS(unsigned, uint)
SPECBRANCH_EMULATOR_VECTORS(float, float)
#undef SPECBRANCH_EMULATOR_VECTORS
