#include <cstring>

#include "kernels.h"

namespace expertstream {

int available_kernels(const Kernels** tables, int capacity) {
  int count = 0;
  auto add = [&](const Kernels& table) {
    if (count < capacity) tables[count++] = &table;
  };
  add(kernels_scalar);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2) add(kernels_avx2);
  if (avx512) add(kernels_avx512_vnni);
#elif defined(__aarch64__)
  add(kernels_neon);
#endif
  return count;
}

const Kernels* find_kernels(const char* name) {
  const Kernels* tables[8];
  const int count = available_kernels(tables, 8);
  if (name == nullptr) return tables[count - 1];
  for (int i = 0; i < count; ++i)
    if (std::strcmp(tables[i]->name, name) == 0) return tables[i];
  return nullptr;
}

}  // namespace expertstream
