// Compiles the file that PRISM_EACH_ISA names once for each instruction set of this architecture, in
// namespace prism::PRISM_ISA, with the vectors of vec.h PRISM_VECTOR_BYTES wide. Include every other header before this
// one, so that no function shared with the rest of the program is compiled for a CPU that may not be there.
//
// The target is set by pragma and not function by function: GCC breaks vectors wider than a function's own target
// apart before it inlines that function anywhere.

#if defined(__x86_64__)

#define PRISM_ISA avx512
#define PRISM_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include <prism/vec.h>
#include PRISM_EACH_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PRISM_ISA
#undef PRISM_VECTOR_BYTES

#define PRISM_ISA avx2
#define PRISM_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include <prism/vec.h>
#include PRISM_EACH_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef PRISM_ISA
#undef PRISM_VECTOR_BYTES

#endif  // __x86_64__

#define PRISM_ISA baseline
#define PRISM_VECTOR_BYTES 16
#include <prism/vec.h>
#include PRISM_EACH_ISA
#undef PRISM_ISA
#undef PRISM_VECTOR_BYTES

// the function `name` as compiled for the chosen instruction set
#if defined(__x86_64__)
#define PRISM_FOR_ISA(name)                                    \
  (::prism::chosen_isa() == ::prism::Isa::avx512 ? ::prism::avx512::name \
   : ::prism::chosen_isa() == ::prism::Isa::avx2 ? ::prism::avx2::name   \
                                                 : ::prism::baseline::name)
#else
#define PRISM_FOR_ISA(name) (::prism::chosen_isa(), ::prism::baseline::name)
#endif
