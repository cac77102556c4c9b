// The function of cuBLAS for which doing nothing would not do.

#include <cstring>

// One algorithm, which needs no workspace: a cublasLtMatmulHeuristicResult_t of 96 bytes.
extern "C" int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found,
                                              int* count) {
  std::memset(found, 0, 96);
  *count = 1;
  return 0;
}
