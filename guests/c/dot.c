/* Dot products in float and double: eight independent accumulators, which -O3 turns into vectors.
 *
 * The same output is expected at every -march level, so nothing may depend on whether the compiler
 * contracts a*b+c to a fused multiply-add: the exact_* inputs have so few significant bits that
 * their products are exact, and the others say fma() where they mean it. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifndef N
#define N 4096
#endif
#define LANES 8

static float fa[N], fb[N];
static double da[N], db[N];
static uint64_t state = 88172645463325252u;

static uint64_t random64(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static float exact_f32(const float *a, const float *b) {
    float lane[LANES] = {0}, sum = 0;
    for (int i = 0; i < N; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += a[i + j] * b[i + j];
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

static double exact_f64(const double *a, const double *b) {
    double lane[LANES] = {0}, sum = 0;
    for (int i = 0; i < N; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += a[i + j] * b[i + j];
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

static float fused_f32(const float *a, const float *b) {
    float lane[LANES] = {0}, sum = 0;
    for (int i = 0; i < N; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = fmaf(a[i + j], b[i + j], lane[j]);
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

static double fused_f64(const double *a, const double *b) {
    double lane[LANES] = {0}, sum = 0;
    for (int i = 0; i < N; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = fma(a[i + j], b[i + j], lane[j]);
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

static void show_f32(const char *name, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    printf("%s = %.9g (%08x)\n", name, value, bits);
}

static void show_f64(const char *name, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    printf("%s = %.17g (%016llx)\n", name, value, (unsigned long long)bits);
}

int main(void) {
    for (int i = 0; i < N; i++) { /* 11 significant bits: the products fit in 22 */
        fa[i] = (float)((int)(random64() >> 53) - 1024) / 64;
        fb[i] = (float)((int)(random64() >> 53) - 1024) / 512;
        da[i] = fa[i] / 3;
        db[i] = (double)fb[i] * 4;
    }
    for (int i = 0; i < N; i++) da[i] = (double)(int64_t)(da[i] * 1024);
    show_f32("exact f32", exact_f32(fa, fb));
    show_f64("exact f64", exact_f64(da, db));
    for (int i = 0; i < N; i++) { /* now full significands: the products round */
        fa[i] = fa[i] / 3;
        fb[i] = fb[i] / 7;
        da[i] = da[i] / 3;
        db[i] = db[i] / 7;
    }
    show_f32("fused f32", fused_f32(fa, fb));
    show_f64("fused f64", fused_f64(da, db));
    return 0;
}
