/* Matrix multiplication in float, double, int32 and int16 with int32 sums.
 *
 * The floating inputs are small multiples of 1/16, so that every product is exact and a contracted
 * multiply-add gives the same sum at every -march level. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifndef N
#define N 48
#endif

static float fa[N][N], fb[N][N], fc[N][N];
static double da[N][N], db[N][N], dc[N][N];
static int32_t ia[N][N], ib[N][N], ic[N][N];
static int16_t sa[N][N], sb[N][N];
static int32_t sc[N][N];

#define MULTIPLY(name, type, sum_type)                                                    \
    static void name(type a[N][N], type b[N][N], sum_type c[N][N]) {          \
        for (int i = 0; i < N; i++) {                                                     \
            for (int j = 0; j < N; j++) c[i][j] = 0;                                      \
            for (int k = 0; k < N; k++)                                                   \
                for (int j = 0; j < N; j++) c[i][j] += (sum_type)a[i][k] * b[k][j];       \
        }                                                                                 \
    }

MULTIPLY(multiply_f32, float, float)
MULTIPLY(multiply_f64, double, double)
MULTIPLY(multiply_i32, int32_t, int32_t)

/* Row times column of the transposed matrix: the shape that becomes vpmaddwd. */
static void multiply_i16(int16_t a[N][N], int16_t bt[N][N], int32_t c[N][N]) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            int32_t sum = 0;
            for (int k = 0; k < N; k++) sum += a[i][k] * bt[j][k];
            c[i][j] = sum;
        }
}

static uint64_t fnv1a(const void *start, size_t size) {
    const uint8_t *p = start;
    uint64_t hash = 0xcbf29ce484222325u;
    while (size--) hash = (hash ^ *p++) * 0x100000001b3u;
    return hash;
}

int main(void) {
    uint32_t seed = 12345;
    double trace = 0, norm = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            seed = seed * 1664525 + 1013904223;
            fa[i][j] = (float)(int)(seed >> 20) / 16 - 100;
            fb[i][j] = (float)(int)(seed >> 24) / 16 - 3;
            da[i][j] = fa[i][j] / 8;
            db[i][j] = fb[i][j] * 2;
            ia[i][j] = (int32_t)(seed >> 8);
            ib[i][j] = (int32_t)seed >> 4;
            sa[i][j] = (int16_t)(seed >> 16);
            sb[i][j] = (int16_t)(seed >> 12);
        }
    multiply_f32(fa, fb, fc);
    multiply_f64(da, db, dc);
    multiply_i32(ia, ib, ic);
    multiply_i16(sa, sb, sc);
    for (int i = 0; i < N; i++) trace += dc[i][i];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) norm = fc[i][j] > norm ? fc[i][j] : norm;
    printf("f32 %016llx max %.3f\n", (unsigned long long)fnv1a(fc, sizeof fc), norm);
    printf("f64 %016llx trace %.6f\n", (unsigned long long)fnv1a(dc, sizeof dc), trace);
    printf("i32 %016llx\n", (unsigned long long)fnv1a(ic, sizeof ic));
    printf("i16 %016llx corner %d\n", (unsigned long long)fnv1a(sc, sizeof sc), sc[N - 1][N - 1]);
    return 0;
}
