/* What the processor can do at most: multiply-adds on registers, and reading memory.
 *
 * Each function does its work `rounds` times and returns how much it did, in operations or in bytes;
 * whoever calls it takes the time. Compiled with -march=native by machine.py.
 */

#include <stddef.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef float floats __attribute__((vector_size(BYTES)));
typedef double doubles __attribute__((vector_size(BYTES)));

/* Two units with a latency of 4 or 5 cycles need 8 or 10 sums that do not wait for one another;
 * AVX2 has 16 registers, of which two hold the factors. */
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
enum { SUMS = 12 };

/* Read where the compiler cannot see their values, so that it computes what it is told to. */
static volatile float factor = 0.999f, addend = 1e-3f;
static volatile float sink;

/* sum = sum * x + y; the sums start different, or one would do for all of them. */
#define START(i) sum##i = y + i;
#define STEP(i) sum##i = sum##i * x + y;
#define TOTAL(i) total += sum##i;
#define DECLARED sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7, sum8, sum9, sum10, sum11

double float32(long rounds) {
    floats x = factor + (floats){0}, y = addend + (floats){0}, total = y, DECLARED;
    EACH(START)
    for (long i = 0; i < rounds; i++) {
        EACH(STEP)
    }
    EACH(TOTAL)
    sink = total[0];
    return 2.0 * SUMS * (sizeof(floats) / sizeof(float)) * rounds;
}

double float64(long rounds) {
    doubles x = (double)factor + (doubles){0}, y = (double)addend + (doubles){0}, total = y, DECLARED;
    EACH(START)
    for (long i = 0; i < rounds; i++) {
        EACH(STEP)
    }
    EACH(TOTAL)
    sink = (float)total[0];
    return 2.0 * SUMS * (sizeof(doubles) / sizeof(double)) * rounds;
}

#if defined(__AVX512BF16__)
#define DOT(i) sum##i = (floats)_mm512_dpbf16_ps((__m512)sum##i, pairs, pairs);

/* sum += x0 * y0 + x1 * y1, with pairs of bfloat16. */
double bfloat16(long rounds) {
    floats y = addend + (floats){0}, total = y, DECLARED;
    __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)y, (__m512)y);
    EACH(START)
    for (long i = 0; i < rounds; i++) {
        EACH(DOT)
    }
    EACH(TOTAL)
    sink = total[0];
    return 4.0 * SUMS * (sizeof(floats) / sizeof(float)) * rounds;
}
#endif

/* Sums up `bytes` bytes, a multiple of `SUMS` vectors, at an address that a vector may have. */
double read_memory(const floats *data, size_t bytes, long rounds) {
    floats y = addend + (floats){0}, total = y, DECLARED;
    EACH(START)
    for (long i = 0; i < rounds; i++) {
        for (const floats *at = data, *end = data + bytes / sizeof(floats); at < end; at += SUMS) {
#define READ(i) sum##i += at[i];
            EACH(READ)
        }
    }
    EACH(TOTAL)
    sink = total[0];
    return (double)bytes * rounds;
}
