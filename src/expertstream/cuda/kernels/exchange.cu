// Experts that the host's processor computes while a recorded step runs: the card asks through a mailbox in host memory, the host answers
// there, and the results take their places among those of the card. Which pairs go to the host never changes a value.
#include "common.cuh"

// Host memory, one question and its answer at a time. control: the words below. experts (E): the numbers of the experts; addresses (E, kParts): of
// their parts, 0 for one that the card does not know; pair_start (E + 1), pair_token (pairs): as the CPU's ops take them. x (tokens, hidden),
// y (pairs, hidden). guess, likely (pairs): what the next layer will probably select, and with which weights.
struct Mailbox {
  i64* control;
  i64* experts;
  u64* addresses;
  i64* pair_start;
  i64* pair_token;
  float* x;
  const float* y;
  i64* guess;
  float* likely;
};
constexpr int kParts = 12;  // at most: three matrices, each with values, scales, biases and a bias of its rows
constexpr int kAsked = 0, kAnswered = 8, kFailed = 16, kExperts = 24, kPairs = 25, kGuesses = 26;  // in different cache lines, where both sides write

// What a layer's question is called: larger than those of all layers and steps before.
__device__ __forceinline__ i64 question(const i64* step, int layer) { return *step + layer + 1; }

// Divides the pairs (tokens·top_k) of a layer between card and host, and asks the host for its own. An expert whose address lies in the arena can
// be computed by either: the host gets share[n] of n such; it gets all that have no address. One block. chosen: the pairs' experts, −1 for the
// host's. own: their number, and which pairs they are in the order of the answer. guess, likely: of
// the next layer (pairs), or null. Shared: 16 bytes a pair.
extern "C" __global__ void ask(const Mailbox box, const u64* table, int stride, i64 arena, i64 arena_bytes, const i64* selected, int tokens,
                               int top_k, const float* x, int hidden, const int* share, const i64* step, int layer, int last, const i64* guess,
                               const float* likely, i64* chosen, int* own) {
  after_previous_beside_next();
  DYNAMIC_SHARED(memory);
  const int pairs = tokens * top_k;
#pragma unroll 4
  for (int i = threadIdx.x; i < tokens * hidden; i += blockDim.x) box.x[i] = x[i];  // on its way while pairs are divided
  if (guess)
#pragma unroll 1
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
      box.guess[p] = guess[p];
      box.likely[p] = likely[p];
    }
  constexpr i64 kReadable = 1ll << 40;
  i64* key = reinterpret_cast<i64*>(memory);      // of an expert that the host may compute: those without an address first; −1 for others
  int* first = reinterpret_cast<int*>(key + pairs);  // whether no pair before has the same expert
  int* rank = first + pairs;                      // of a pair's expert among the host's, −1 for the card's
#pragma unroll 1
  for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
    const i64 expert = selected[p], at = static_cast<i64>(table[expert * stride]);
    key[p] = at == 0 ? expert : at >= arena && at - arena < arena_bytes ? expert + kReadable : -1;
  }
  __syncthreads();
#pragma unroll 1
  for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
    int before = 0;
#pragma unroll 1
    for (int q = 0; q < p; ++q) before += key[q] == key[p] ? 1 : 0;
    first[p] = before == 0 && key[p] >= 0 ? 1 : 0;
  }
  __syncthreads();
#pragma unroll 1
  for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
    int missing = 0, readable = 0, below = 0;
#pragma unroll 1
    for (int q = 0; q < pairs; ++q) {
      if (!first[q]) continue;
      missing += key[q] < kReadable ? 1 : 0;
      readable += key[q] < kReadable ? 0 : 1;
      below += key[q] < key[p] ? 1 : 0;
    }
    const bool host = key[p] >= 0 && below < missing + share[readable];
    rank[p] = host ? below : -1;
    chosen[p] = host ? -1 : selected[p];
  }
  __syncthreads();
#pragma unroll 1
  for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
    if (rank[p] < 0) continue;
    int place = 0;
#pragma unroll 1
    for (int q = 0; q < pairs; ++q)
      place += rank[q] >= 0 && (rank[q] < rank[p] || (rank[q] == rank[p] && q < p)) ? 1 : 0;
    own[1 + place] = p;
    box.pair_token[place] = p / top_k;
    if (!first[p]) continue;
    const i64 expert = selected[p];
    box.experts[rank[p]] = expert;
    box.pair_start[rank[p]] = place;
#pragma unroll 1
    for (int i = 0; i < stride; ++i) box.addresses[rank[p] * kParts + i] = table[expert * stride + i];
  }
  int mine = 0, experts = 0;
#pragma unroll 1
  for (int p = 0; p < pairs; ++p) {
    mine += rank[p] >= 0 ? 1 : 0;
    experts += rank[p] >= 0 ? first[p] : 0;
  }
  if (threadIdx.x == 0) {
    own[0] = mine;
    if (mine || last) {
      box.control[kExperts] = experts;
      box.control[kPairs] = mine;
      box.control[kGuesses] = guess ? pairs : 0;
      box.pair_start[experts] = mine;
    }
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0 && (mine || last)) *static_cast<volatile i64*>(box.control + kAsked) = question(step, layer);
}

// Waits for the answer, if the host was asked, and puts it into y (pairs, hidden). The kernel before must start after ask() has ended. patience: ns;
// then the question is entered as failed.
extern "C" __global__ void collect(const Mailbox box, const int* own, const i64* step, int layer, i64 patience, int hidden, float* y) {
  const int pairs = *static_cast<const volatile int*>(own);
  if (pairs) {
    if (threadIdx.x == 0 && !wait_for_host(box.control + kAnswered, question(step, layer), patience))
      *static_cast<volatile i64*>(box.control + kFailed) = question(step, layer);
    __syncthreads();
  }
  after_previous();
#pragma unroll 1
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < pairs * hidden; i += gridDim.x * blockDim.x)
    y[static_cast<i64>(own[1 + i / hidden]) * hidden + i % hidden] = static_cast<const volatile float*>(box.y)[i];
}
