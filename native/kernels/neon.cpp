#include "simd_neon.h"
// The order matters: each header uses the types and functions of those above.
#include "gemm.h"
#include "matmul.h"
#include "mixers.h"
#include "rows.h"
#include "table.h"

namespace expertstream {
const Kernels kernels_neon = KERNEL_TABLE("neon");
}
