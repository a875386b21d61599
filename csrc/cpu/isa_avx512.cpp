// AVX-512 F, BW, DQ, VL; bfloat16 is widened to float32.
#define HTC_ISA avx512
#define HTC_VECTOR_BYTES 64
#define HTC_BF16_DOT 0
#include "kernels.h"
