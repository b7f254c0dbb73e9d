#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(SPECBRANCH_X86)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(SPECBRANCH_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specbranch {
namespace {

// Of this processor.
Isa best_without_tiles() {
#ifdef SPECBRANCH_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Not named by older compilers' __builtin_cpu_supports: leaf 7, bit 5 of EAX of its second part.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool dot_products = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1) != 0;
  const bool bytes = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                     __builtin_cpu_supports("avx512vnni");
  if (avx512 && dot_products && bytes) return Isa::bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#elif defined(SPECBRANCH_ARM_BF16) && defined(__linux__)
  constexpr unsigned long bf16_bit = 1ul << 14, dot_bit = 1ul << 20;  // HWCAP2_BF16, HWCAP_ASIMDDP
  if ((getauxval(AT_HWCAP2) & bf16_bit) != 0 && (getauxval(AT_HWCAP) & dot_bit) != 0) return Isa::bf16;
#endif
  return Isa::baseline;
}

// Whether this processor, which has the level below, has tiles, and the operating system keeps them and grants them to
// this process: Linux does when asked, for all threads from then on.
bool ask_for_amx() {
#if defined(SPECBRANCH_AMX) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8: leaf 7, EDX
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & needed) != needed) return false;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c >> 27 & 1) == 0) return false;  // OSXSAVE: XGETBV may be used
  unsigned kept = 0, high = 0;
  asm volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
  constexpr unsigned config_bit = 17, data_bit = 18;
  if ((kept >> config_bit & 1) == 0 || (kept >> data_bit & 1) == 0) return false;
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, static_cast<long>(data_bit)) == 0;
#else
  return false;
#endif
}

Isa choose_isa() {
  const Isa below = best_without_tiles();
  const auto best = [&] { return below == Isa::bf16 && ask_for_amx() ? Isa::amx : below; };
  const char* asked = std::getenv("SPECBRANCH_ISA");
  if (asked == nullptr || *asked == '\0') return best();
  for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::bf16, Isa::amx}) {
    if (asked == std::string(isa_name(level))) {
      if (level <= below || level == best()) return level;
      throw std::invalid_argument("SPECBRANCH_ISA=" + std::string(asked) + ": this processor or build has only " +
                                  isa_name(best()));
    }
  }
  throw std::invalid_argument("SPECBRANCH_ISA=" + std::string(asked) +
                              ": expected baseline, avx2, avx512, bf16 or amx");
}

}  // namespace

Isa isa() {
  static const Isa level = choose_isa();
  return level;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::amx: return "amx";
    case Isa::bf16: return "bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace specbranch
