/* What the sandbox is for, in one program: built for x86-64-v3, it is full of VEX code that bare
 * Unicorn refuses (256-bit vectors) or computes wrongly without a word (128-bit vectors).
 * It prints a dot product, a SHA-256 digest and a text search. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define N 2048
#ifndef TEXT
#define TEXT 65536
#endif

static float a[N], b[N];
static char text[TEXT + 1];

static float dot(const float *x, const float *y) {
    float lane[8] = {0}, sum = 0;
    for (int i = 0; i < N; i += 8)
        for (int j = 0; j < 8; j++) lane[j] = fmaf(x[i + j], y[i + j], lane[j]);
    for (int j = 0; j < 8; j++) sum += lane[j];
    return sum;
}

/* Counts a letter and sums all bytes: byte compares and widening adds, 32 lanes at a time. */
static uint32_t census(char letter, uint32_t *sum) {
    uint32_t count = 0, total = 0;
    for (int i = 0; i < TEXT; i++) {
        count += text[i] == letter;
        total += (uint8_t)text[i];
    }
    *sum = total;
    return count;
}

static uint32_t rotr(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The round constants of FIPS 180-4 are the fractions of the cube roots of the first 64 primes;
 * the initial state those of the square roots of the first 8. */
static uint32_t fraction(uint32_t prime, int cube) {
    uint64_t low = 0, high = (uint64_t)20 << 32; /* fixed point, 32 fraction bits */
    while (high - low > 1) {
        unsigned __int128 middle = low + (high - low) / 2, power = middle * middle;
        if (cube) power = (power >> 32) * middle + ((power & 0xffffffff) * middle >> 32);
        if (power >> 64 >= prime) high = (uint64_t)middle;
        else low = (uint64_t)middle;
    }
    return (uint32_t)low;
}

static void compress(uint32_t h[8], const uint32_t k[64], const uint8_t *block) {
    uint32_t w[64], s[8];
    memcpy(w, block, 64);
    for (int i = 0; i < 16; i++) w[i] = __builtin_bswap32(w[i]);
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
               (rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = s[7] + (rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25)) +
                      ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
        uint32_t t2 = (rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22)) +
                      ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 28);
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

/* The digest of `size` bytes, a multiple of 64. */
static void sha256(const char *message, size_t size, uint32_t h[8]) {
    uint32_t k[64], prime = 2;
    uint8_t last[64] = {0x80};
    uint64_t bits = __builtin_bswap64((uint64_t)size * 8);
    for (int i = 0; i < 64; prime++) {
        uint32_t d = 2;
        while (prime % d) d++;
        if (d < prime) continue;
        if (i < 8) h[i] = fraction(prime, 0);
        k[i++] = fraction(prime, 1);
    }
    memcpy(last + 56, &bits, 8);
    for (size_t i = 0; i < size; i += 64) compress(h, k, (const uint8_t *)message + i);
    compress(h, k, last);
}

int main(void) {
    static const char phrase[] = "it was the best of times, it was the worst of times; ";
    uint32_t h[8], sum, count;
    for (int i = 0; i < N; i++) {
        a[i] = (float)(i % 97) / 7;
        b[i] = (float)(i % 89 - 44) / 11;
    }
    for (size_t i = 0; i < TEXT; i++) text[i] = phrase[i % (sizeof phrase - 1)];
    memcpy(text + TEXT - 100, "vector", 6);
    count = census('t', &sum);
    printf("dot product   %.6f\n", dot(a, b));
    printf("text search   'vector' at %ld, 't' %u times, byte sum %u\n",
           (long)(strstr(text, "vector") - text), count, sum);
    sha256(text, 4096, h);
    printf("sha-256       ");
    for (int i = 0; i < 8; i++) printf("%08x", h[i]);
    putchar('\n');
    return 0;
}
