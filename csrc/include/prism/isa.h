#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

namespace prism {

// each instruction set includes those before it
enum class Isa { baseline, avx2, avx512 };

inline bool has_isa(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_isa(Isa::avx2);
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::baseline:
      return true;
  }
#endif
  return isa == Isa::baseline;
}

// the widest instruction set that this CPU has, or the one that PRISM_KERNELS_ISA names
inline Isa choose_isa() {
  const char* name = std::getenv("PRISM_KERNELS_ISA");
  if (name == nullptr || *name == '\0') {
    return has_isa(Isa::avx512) ? Isa::avx512 : has_isa(Isa::avx2) ? Isa::avx2 : Isa::baseline;
  }
  const std::string wanted(name);
  for (auto [isa, known] : {std::pair{Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::baseline, "baseline"}}) {
    if (wanted != known) continue;
    if (!has_isa(isa)) {
      throw std::runtime_error("PRISM_KERNELS_ISA: expected an instruction set of this CPU, got " + wanted);
    }
    return isa;
  }
  throw std::runtime_error("PRISM_KERNELS_ISA: expected avx512, avx2 or baseline, got " + wanted);
}

// choose_isa(), called once in the life of the process
inline Isa chosen_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace prism
