/* long double mathematics: on x86 these are x87 instructions, the transcendental ones among them.
 *
 * Sums are printed with fewer digits than they have, because processors differ in the last bit. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef STEPS
#define STEPS 40
#endif

static void print(const char *name, long double value) {
    printf("%-12s %.16Lg\n", name, value);
}

int main(void) {
    volatile long double unit = 0.7L, odd = 3.3L, zero = 0;
    long double waves = 0, powers = 0, angles = 0, rests = 0, integers = 0;

    for (int i = 1; i <= STEPS; i++) {
        long double x = unit * i;
        waves += sinl(x) * cosl(x) + tanl(x / 50);
        powers += powl(x, 1.3L) + expl(-x) + logl(x) + log2l(x) + log1pl(x / 100) + sqrtl(x);
        angles += atan2l(x, odd) + atanl(x) + hypotl(x, odd);
        rests += fmodl(x * 1e10L, odd) + remainderl(x, odd) + ldexpl(x, -i);
        integers += (long long)x + (int)(x * 100) + floorl(x) + rintl(x) + lrintl(x);
    }
    print("waves", waves);
    print("powers", powers);
    print("angles", angles);
    print("rests", rests);
    print("integers", integers);
    printf("exact        %La %La\n", unit / odd, sqrtl(odd));
    printf("range        %.6Le %.6Le\n", odd * 1e4000L, unit * 1e-4940L);
    printf("special      %Lf %Lf %d\n", odd / zero, -zero, isnan(zero / zero));
    printf("compare      %d %d %d\n", unit < odd, unit == odd, unit > zero / zero);
    printf("parse        %La\n", strtold("3.14159265358979323846264338327950288", NULL));
    return 0;
}
