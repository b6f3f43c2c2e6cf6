/* Sorting: the C library's qsort and bsearch on ints, doubles and records, and a radix sort. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef N
#define N 3000
#endif

struct record {
    char name[12];
    uint32_t key;
    double weight;
};

static int32_t ints[N];
static double doubles[N];
static struct record records[N];
static uint32_t keys[N], scratch[N];

static int by_int(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static int by_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int by_record(const void *a, const void *b) {
    const struct record *x = a, *y = b;
    int order = strcmp(x->name, y->name);
    return order ? order : by_double(&x->weight, &y->weight);
}

static void radix_sort(uint32_t *from, uint32_t *to) {
    for (int shift = 0; shift < 32; shift += 8) {
        uint32_t start[257] = {0}, *swap = from;
        for (int i = 0; i < N; i++) start[(from[i] >> shift & 255) + 1]++;
        for (int i = 0; i < 256; i++) start[i + 1] += start[i];
        for (int i = 0; i < N; i++) to[start[from[i] >> shift & 255]++] = from[i];
        from = to;
        to = swap;
    }
}

static uint64_t fnv1a(const void *start, size_t size) {
    const uint8_t *p = start;
    uint64_t hash = 0xcbf29ce484222325u;
    while (size--) hash = (hash ^ *p++) * 0x100000001b3u;
    return hash;
}

int main(void) {
    uint32_t seed = 1;
    int found = 0, ordered = 1;
    for (int i = 0; i < N; i++) {
        seed = seed * 1103515245 + 12345;
        ints[i] = (int32_t)(seed ^ seed >> 15);
        doubles[i] = (double)ints[i] / 1024;
        keys[i] = seed;
        snprintf(records[i].name, sizeof records[i].name, "n%u", seed >> 25);
        records[i].key = (uint32_t)i;
        records[i].weight = doubles[i] * 0.5;
    }
    qsort(ints, N, sizeof *ints, by_int);
    qsort(doubles, N, sizeof *doubles, by_double);
    qsort(records, N, sizeof *records, by_record);
    radix_sort(keys, scratch);
    for (int i = 0; i + 1 < N; i++) {
        ordered &= ints[i] <= ints[i + 1] && doubles[i] <= doubles[i + 1];
        ordered &= by_record(&records[i], &records[i + 1]) <= 0 && keys[i] <= keys[i + 1];
    }
    for (int i = 0; i < N; i++) {
        int32_t wanted = ints[i] + i % 3;
        found += bsearch(&wanted, ints, N, sizeof *ints, by_int) != NULL;
    }
    printf("ordered %d found %d\n", ordered, found);
    printf("ints    %016llx %d..%d\n", (unsigned long long)fnv1a(ints, sizeof ints), ints[0],
           ints[N - 1]);
    printf("doubles %016llx %.3f..%.3f\n", (unsigned long long)fnv1a(doubles, sizeof doubles),
           doubles[0], doubles[N - 1]);
    printf("records %s %u .. %s %u\n", records[0].name, records[0].key, records[N - 1].name,
           records[N - 1].key);
    printf("keys    %016llx\n", (unsigned long long)fnv1a(keys, sizeof keys));
    return 0;
}
