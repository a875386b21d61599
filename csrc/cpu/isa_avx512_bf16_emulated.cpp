// The logic of isa_avx512_bf16.cpp with the one instruction emulated, so that it is tested on
// processors without it. Never chosen by itself.
#define HTC_ISA avx512_bf16_emulated
#define HTC_VECTOR_BYTES 64
#define HTC_BF16_DOT 1
#include "kernels.h"
