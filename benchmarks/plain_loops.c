/* Matrix-vector products and a read of memory, as plain loops: the limit of decoding. */

#include <stdint.h>

/* `repeats` times, each matrix ``[out, in]`` of `sizes` (pairs of out and in) times a vector; they
   are one after another in `weights`. x and y are as long as the widest. */
void multiply(const float *weights, const int64_t *sizes, int64_t count, int64_t repeats,
              const float *x, float *y) {
  for (int64_t n = 0; n < repeats; n++) {
    const float *row = weights;
    for (int64_t m = 0; m < count; m++)
      for (int64_t o = 0; o < sizes[2 * m]; o++) {
        float sum = 0;
        for (int64_t i = 0; i < sizes[2 * m + 1]; i++) sum += row[i] * x[i];
        y[o] = sum;
        row += sizes[2 * m + 1];
      }
  }
}

uint64_t read_words(const uint64_t *from, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; i++) sum += from[i];
  return sum;
}
