// The only list of a table's entries, in the order of struct Kernels.
#pragma once

#define KERNEL_TABLE(NAME)               \
  {NAME,           quantize_activations, \
   matmul_rows,    dequantize_row,       \
   read_memory,    multiply,             \
   rms_norm,       gated_rms_norm,       \
   l2_norm,        swiglu,               \
   clamped_swiglu, sigmoid_gate,         \
   axpy,           scale,                \
   softmax,        sigmoid,              \
   decay,          rotary,               \
   to_bf16,        conv,                 \
   attend_segment, merge_segments,       \
   delta_step,     delta_chunk}
