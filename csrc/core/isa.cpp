#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace specbranch {
namespace {

Isa best_isa() {
#ifdef SPECBRANCH_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("SPECBRANCH_ISA");
  if (asked == nullptr || *asked == '\0') return best;
  for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (asked == std::string(isa_name(level))) {
      if (level <= best) return level;
      throw std::invalid_argument("SPECBRANCH_ISA=" + std::string(asked) + ": this processor or build has only " +
                                  isa_name(best));
    }
  }
  throw std::invalid_argument("SPECBRANCH_ISA=" + std::string(asked) + ": expected baseline, avx2 or avx512");
}

}  // namespace

Isa isa() {
  static const Isa level = choose_isa();
  return level;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace specbranch
