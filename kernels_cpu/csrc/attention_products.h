// Small products of matrices in float32, for attention. Only for attention.h to include, inside namespace QUIRE_ISA.

// c[MR, NV * W] = (IS_SUM ? c : 0) + a[MR, depth] b[depth, NV * W], held in registers.
template <int MR, int NV, bool IS_SUM>
static inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                 int64_t depth) {
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = IS_SUM ? load(c + i * ldc + j * W) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const vf factor = splat(a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

// Registers bound the tile: MR * NV sums, NV loaded vectors and one factor.
constexpr int MAX_MR = 6;
constexpr int MAX_NV = W == 16 ? 4 : 2;

template <int NV, bool IS_SUM>
static void multiply_panel(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                           int64_t depth) {
  int64_t tiles = (rows + MAX_MR - 1) / MAX_MR;
  for (int64_t i = 0; i < rows; --tiles) {
    const int64_t n = (rows - i + tiles - 1) / tiles;  // even tiles: 7 rows are 4 and 3, not 6 and 1
    const float* x = a + i * lda;
    float* y = c + i * ldc;
    switch (n) {
      case 6: multiply_tile<6, NV, IS_SUM>(x, lda, b, ldb, y, ldc, depth); break;
      case 5: multiply_tile<5, NV, IS_SUM>(x, lda, b, ldb, y, ldc, depth); break;
      case 4: multiply_tile<4, NV, IS_SUM>(x, lda, b, ldb, y, ldc, depth); break;
      case 3: multiply_tile<3, NV, IS_SUM>(x, lda, b, ldb, y, ldc, depth); break;
      case 2: multiply_tile<2, NV, IS_SUM>(x, lda, b, ldb, y, ldc, depth); break;
      default: multiply_tile<1, NV, IS_SUM>(x, lda, b, ldb, y, ldc, depth); break;
    }
    i += n;
  }
}

// c = (IS_SUM ? c : 0) + a b; columns is a multiple of W.
template <bool IS_SUM>
static void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                     int64_t columns, int64_t depth) {
  int64_t j = 0;
  for (; j + MAX_NV * W <= columns; j += MAX_NV * W)
    multiply_panel<MAX_NV, IS_SUM>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
  if (MAX_NV == 4 && j + 2 * W <= columns) {
    multiply_panel<2, IS_SUM>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
    j += 2 * W;
  }
  if (j < columns) multiply_panel<1, IS_SUM>(a, lda, b + j, ldb, c + j, ldc, rows, depth);
}
