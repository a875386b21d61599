// The lower half of every x86-64, and any other processor: 16-byte vectors, no special instruction.
#define HTC_ISA portable
#define HTC_VECTOR_BYTES 16
#define HTC_BF16_DOT 0
#include "kernels.h"
