/* The outer planets for 100 steps: double-precision divide, square root and fused multiply-add.
 *
 * Every multiply-add is written as fma(), so that all -march levels print the same digits. */
#include <math.h>
#include <stdio.h>

#define BODIES 5
#define DAYS 365.24
#define SUN_MASS (4 * 3.141592653589793 * 3.141592653589793)

struct body {
    double at[3], speed[3], mass;
};

static struct body bodies[BODIES] = {
    {{0}, {0}, SUN_MASS},
    {{4.841431442464721, -1.1603200440274284, -0.10362204447112311},
     {0.001660076642744037 * DAYS, 0.007699011184197404 * DAYS, -0.0000690460016972063 * DAYS},
     0.0009547919384243266 * SUN_MASS},
    {{8.34336671824458, 4.124798564124305, -0.4035234171143214},
     {-0.002767425107268624 * DAYS, 0.004998528012349172 * DAYS, 0.00002304172975737639 * DAYS},
     0.0002858859806661308 * SUN_MASS},
    {{12.894369562139131, -15.111151401698631, -0.22330757889265573},
     {0.002964601375647616 * DAYS, 0.0023784717395948095 * DAYS, -0.00002965895685402376 * DAYS},
     0.00004366244043351563 * SUN_MASS},
    {{15.379697114850917, -25.919314609987964, 0.17925877295037118},
     {0.0026806777249038932 * DAYS, 0.001628241700382423 * DAYS, -0.00009515922545197159 * DAYS},
     0.00005151389020466114 * SUN_MASS}};

static double dot(const double *a, const double *b) {
    return fma(a[0], b[0], fma(a[1], b[1], a[2] * b[2]));
}

static void advance(double step) {
    for (int i = 0; i < BODIES; i++)
        for (int j = i + 1; j < BODIES; j++) {
            double apart[3], squared, pull;
            for (int k = 0; k < 3; k++) apart[k] = bodies[i].at[k] - bodies[j].at[k];
            squared = dot(apart, apart);
            pull = step / (squared * sqrt(squared));
            for (int k = 0; k < 3; k++) {
                bodies[i].speed[k] = fma(-apart[k], bodies[j].mass * pull, bodies[i].speed[k]);
                bodies[j].speed[k] = fma(apart[k], bodies[i].mass * pull, bodies[j].speed[k]);
            }
        }
    for (int i = 0; i < BODIES; i++)
        for (int k = 0; k < 3; k++)
            bodies[i].at[k] = fma(step, bodies[i].speed[k], bodies[i].at[k]);
}

static double energy(void) {
    double total = 0;
    for (int i = 0; i < BODIES; i++) {
        total = fma(bodies[i].mass * 0.5, dot(bodies[i].speed, bodies[i].speed), total);
        for (int j = i + 1; j < BODIES; j++) {
            double apart[3];
            for (int k = 0; k < 3; k++) apart[k] = bodies[i].at[k] - bodies[j].at[k];
            total -= bodies[i].mass * bodies[j].mass / sqrt(dot(apart, apart));
        }
    }
    return total;
}

int main(void) {
    double momentum[3] = {0};
    for (int i = 0; i < BODIES; i++)
        for (int k = 0; k < 3; k++)
            momentum[k] = fma(bodies[i].speed[k], bodies[i].mass, momentum[k]);
    for (int k = 0; k < 3; k++) bodies[0].speed[k] = -momentum[k] / SUN_MASS;
    printf("%.15g\n", energy());
    for (int i = 0; i < 100; i++) advance(0.01);
    printf("%.15g\n", energy());
    for (int i = 0; i < BODIES; i++)
        printf("%a %a %a\n", bodies[i].at[0], bodies[i].at[1], bodies[i].at[2]);
    return 0;
}
