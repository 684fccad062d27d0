// Compiles the file that PRISM_EACH_ISA names once for each instruction set of this architecture, in namespace
// prism::PRISM_ISA, with vectors of PRISM_VECTOR_BYTES (vec.h). Include every other header before this one: a function
// that the rest of the program shares must not be compiled for instructions that the CPU may lack.
//
// A pragma sets the target, not an attribute of each function: GCC splits vectors that are wider than a function's own
// target before it inlines the function.

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
