// CUDA's built-in types, with their alignment: the undefined-behaviour sanitizer then reports a misaligned access.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

#define SPECBRANCH_EMULATOR_VECTORS(type, name)                                                        \
  struct alignas(2 * sizeof(type)) name##2 {                                                           \
    type x, y;                                                                                         \
  };                                                                                                   \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 {                              \
    type x, y, z, w;                                                                                   \
  };                                                                                                   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                     \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SPECBRANCH_EMULATOR_VECTORS(signed char, char)
SPECBRANCH_EMULATOR_VECTORS(unsigned char, uchar)
SPECBRANCH_EMULATOR_VECTORS(short, short)
SPECBRANCH_EMULATOR_VECTORS(unsigned short, ushort)
SPECBRANCH_EMULATOR_VECTORS(int, int)
SPECBRANCH_EMULATOR_VECTORS(unsigned, uint)
SPECBRANCH_EMULATOR_VECTORS(long long, longlong)
SPECBRANCH_EMULATOR_VECTORS(unsigned long long, ulonglong)
SPECBRANCH_EMULATOR_VECTORS(float, float)
SPECBRANCH_EMULATOR_VECTORS(double, double)
#undef SPECBRANCH_EMULATOR_VECTORS

struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
