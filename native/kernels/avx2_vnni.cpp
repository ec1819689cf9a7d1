#include "simd_avx2.h"
// The order matters: what follows is written in terms of the types and functions above.
#include "gemm.h"
#include "matmul.h"
#include "mixers.h"
#include "rows.h"
#include "table.h"

namespace expertstream {
const Kernels kernels_avx2_vnni = KERNEL_TABLE("avx2_vnni");
}
