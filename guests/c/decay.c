/* Geometric decay through the smallest numbers: where it ends depends on MXCSR.FTZ and DAZ, which
   the startup code of -ffast-math sets. Prints exact bit patterns. */

#include <float.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define LANES 16

static uint64_t hash;

static void mix(const void *data, size_t size)
{
    const unsigned char *bytes = data;
    while (size--)
        hash = (hash ^ *bytes++) * 0x100000001b3u;
}

static void report(const char *what, long count)
{
    printf("%-18s %6ld  %016" PRIx64 "\n", what, count, hash);
}

static float singles[LANES];
static double doubles[LANES];
static volatile float single_factor = 0.75f;
static volatile double double_factor = 0.5, tiny_double = 1e-39;

static long fade_singles(void)
{
    long steps = 0, alive = 1;
    for (int i = 0; i < LANES; i++)
        singles[i] = (float)(i + 1) * 1e-30f;
    for (float factor = single_factor; alive && steps < 1000; steps++) {
        alive = 0;
        for (int i = 0; i < LANES; i++)
            singles[i] *= factor;
        for (int i = 0; i < LANES; i++)
            alive += singles[i] > 1e-44f;
        mix(singles, sizeof singles);
    }
    return steps;
}

static long fade_doubles(void)
{
    long steps = 0, alive = 1;
    for (int i = 0; i < LANES; i++)
        doubles[i] = (double)(i + 3) * 1e-300;
    for (double factor = double_factor; alive && steps < 1000; steps++) {
        alive = 0;
        for (int i = 0; i < LANES; i++)
            doubles[i] *= factor;
        for (int i = 0; i < LANES; i++)
            alive += doubles[i] > DBL_MIN / (1ull << 50);
        mix(doubles, sizeof doubles);
    }
    return steps;
}

static long narrow(void)
{
    long zeros = 0;
    for (int i = 0; i < LANES; i++) {
        doubles[i] = tiny_double * (i + 1);
        singles[i] = (float)doubles[i];
        zeros += singles[i] == 0;
    }
    mix(singles, sizeof singles);
    return zeros;
}

int main(void)
{
    union { uint32_t bits; float value; } tiny = { 0x00400000 };
    volatile float denormal = tiny.value, twice = denormal * 2;
    hash = 0xcbf29ce484222325u;
    report("singles", fade_singles());
    report("doubles", fade_doubles());
    report("narrowed to zero", narrow());
    printf("%-18s %6d\n", "denormals count", twice != 0);
    return 0;
}
