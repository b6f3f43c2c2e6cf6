/* Runs a sample program BENCH_REPEAT times (once by default): the sample is compiled with its main
 * renamed to sample_main. */
#include <stdlib.h>

int sample_main(int argc, char **argv);

int main(int argc, char **argv) {
    const char *wanted = getenv("BENCH_REPEAT");
    int status = 0;
    for (int left = wanted ? atoi(wanted) : 1; left > 0; left--) status = sample_main(argc, argv);
    return status;
}
