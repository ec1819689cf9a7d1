#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace expertstream {

namespace {

bool runs_here([[maybe_unused]] const Kernels* table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (table == &kernels_avx2) return avx2;
  if (table == &kernels_avx2_vnni) return avx2 && __builtin_cpu_supports("avxvnni");
  if (table == &kernels_avx512_vnni)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  if (table == &kernels_neon_dot) return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#elif defined(__aarch64__)
  return table != &kernels_neon_dot;
#endif
  return true;
}

}  // namespace

int all_kernels(const Kernels** tables, int capacity) {
  const Kernels* all[] = {
      &kernels_scalar,
#if defined(__x86_64__)
      &kernels_avx2,
      &kernels_avx2_vnni,
      &kernels_avx512_vnni,
#elif defined(__aarch64__)
      &kernels_neon,
      &kernels_neon_dot,
#endif
  };
  int count = 0;
  for (const Kernels* table : all)
    if (count < capacity) tables[count++] = table;
  return count;
}

int available_kernels(const Kernels** tables, int capacity) {
  const Kernels* all[8];
  const int total = all_kernels(all, 8);
  int count = 0;
  for (int i = 0; i < total; ++i)
    if (runs_here(all[i]) && count < capacity) tables[count++] = all[i];
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
