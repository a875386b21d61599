// Which instruction sets were built and which of them this processor runs.
#include "../paged_attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hf_tiered_cache {

// setup.py defines one HTC_HAVE_* for every unit that it compiles.
namespace portable {
extern const Kernels kKernels;
}
#if defined(HTC_HAVE_AVX2)
namespace avx2 {
extern const Kernels kKernels;
}
#endif
#if defined(HTC_HAVE_AVX512)
namespace avx512 {
extern const Kernels kKernels;
}
#endif
#if defined(HTC_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif
#if defined(HTC_HAVE_AVX512_BF16_EMULATED)
namespace avx512_bf16_emulated {
extern const Kernels kKernels;
}
#endif

namespace {

constexpr char kNotBuilt[] = "not built: the compiler or the machine it was built for lacks it";

#if defined(__x86_64__)
// Asked once: under a hypervisor the instruction costs a microsecond, as much as a whole call may.
bool has_f16c() {
  static const bool has = [] {
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
  }();
  return has;
}

bool runs_avx2() {
  return has_f16c() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

[[maybe_unused]] KernelChoice missing(const char* name) { return {nullptr, name, kNotBuilt}; }

#if defined(__x86_64__)
KernelChoice built(const Kernels& kernels, bool runs, const char* reason) {
  return {&kernels, kernels.name, runs ? nullptr : reason};
}
#endif

}  // namespace

int num_kernels() { return 5; }

// Intel (Cascade Lake): 0.57 -> 0.73 of the read probe. AMD (Zen 4): a core with software prefetch
// stops at 12 GB/s, without it the processor's own prefetching reaches the probe.
bool wants_prefetch() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

KernelChoice kernel_choice(int number) {
  switch (number) {
    case 0:
#if defined(HTC_HAVE_AVX512_BF16)
      return built(avx512_bf16::kKernels, runs_avx512_bf16(),
                   "this processor lacks AVX512_BF16 (or AVX-512 F, BW, DQ, VL)");
#else
      return missing("avx512_bf16");
#endif
    case 1:
#if defined(HTC_HAVE_AVX512)
      return built(avx512::kKernels, runs_avx512(),
                   "this processor lacks AVX-512 F, BW, DQ or VL");
#else
      return missing("avx512");
#endif
    case 2:
#if defined(HTC_HAVE_AVX2)
      return built(avx2::kKernels, runs_avx2(), "this processor lacks AVX2, FMA or F16C");
#else
      return missing("avx2");
#endif
    case 3:
      return {&portable::kKernels, "portable", nullptr};
    case 4:
      // For tests. Behind "portable", which always runs, so never chosen by itself.
#if defined(HTC_HAVE_AVX512_BF16_EMULATED)
      return built(avx512_bf16_emulated::kKernels, runs_avx512(),
                   "this processor lacks AVX-512 F, BW, DQ or VL");
#else
      return missing("avx512_bf16_emulated");
#endif
    default:
      return {nullptr, "unknown", "there is no such kernel"};
  }
}

}  // namespace hf_tiered_cache
