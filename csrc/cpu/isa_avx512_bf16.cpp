// AVX-512 with VDPBF16PS: bfloat16 pairs are multiplied as they are stored.
#define HTC_ISA avx512_bf16
#define HTC_VECTOR_BYTES 64
#define HTC_BF16_DOT 1
#include "kernels.h"
