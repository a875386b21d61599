// AVX2 with FMA and F16C.
#define HTC_ISA avx2
#define HTC_VECTOR_BYTES 32
#define HTC_BF16_DOT 0
#include "kernels.h"
