/* Integer hashing: FNV-1a, CRC-32, MurmurHash3 (32 bit) and a table of 32-bit and 64-bit mixers
 * that -O3 vectorises (multiply, shift, xor, rotate). */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define BYTES 8192
#define WORDS 2048

static uint8_t data[BYTES];
static uint32_t words[WORDS];
static uint64_t longs[WORDS];

static uint64_t fnv1a(const void *start, size_t size) {
    const uint8_t *p = start;
    uint64_t hash = 0xcbf29ce484222325u;
    while (size--) hash = (hash ^ *p++) * 0x100000001b3u;
    return hash;
}

static uint32_t crc32(const uint8_t *p, size_t size) {
    uint32_t table[256], crc = ~0u;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        table[i] = c;
    }
    while (size--) crc = table[(crc ^ *p++) & 0xff] ^ (crc >> 8);
    return ~crc;
}

static uint32_t rotl32(uint32_t x, int n) { return x << n | x >> (32 - n); }

static uint32_t mix32(uint32_t h) {
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}

static uint64_t mix64(uint64_t h) {
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdu;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53u;
    return h ^ h >> 33;
}

static uint32_t murmur3(const uint8_t *p, size_t size, uint32_t seed) {
    uint32_t hash = seed;
    for (size_t i = 0; i + 4 <= size; i += 4) {
        uint32_t k;
        memcpy(&k, p + i, 4);
        hash ^= rotl32(k * 0xcc9e2d51u, 15) * 0x1b873593u;
        hash = rotl32(hash, 13) * 5 + 0xe6546b64u;
    }
    return mix32(hash ^ (uint32_t)size);
}

int main(void) {
    uint32_t sum32 = 0, xor32 = 0, max32 = 0, bits = 0;
    uint64_t sum64 = 0;
    for (int i = 0; i < BYTES; i++) data[i] = (uint8_t)(i * 131 + (i >> 5));
    for (uint32_t i = 0; i < WORDS; i++) words[i] = mix32(i * 2654435761u);
    for (uint64_t i = 0; i < WORDS; i++) longs[i] = mix64(i * 0x9e3779b97f4a7c15u);
    for (int i = 0; i < WORDS; i++) words[i] = rotl32(words[i], 7) ^ (uint32_t)(longs[i] >> 32);
    for (int i = 0; i < WORDS; i++) longs[i] <<= words[i] & 63;
    for (int i = 0; i < WORDS; i++) {
        sum32 += words[i];
        xor32 ^= words[i];
        max32 = words[i] > max32 ? words[i] : max32;
        sum64 += longs[i];
    }
    for (int i = 0; i < WORDS; i++) bits += (uint32_t)__builtin_popcountll(longs[i]);
    for (int i = 0; i < WORDS; i++) bits ^= (uint32_t)__builtin_ctzll(longs[i] | 1u << 20) << 3;
    printf("check fnv1a %016llx crc32 %08x\n", (unsigned long long)fnv1a("hello", 5),
           crc32((const uint8_t *)"123456789", 9));
    printf("fnv1a   %016llx\n", (unsigned long long)fnv1a(data, BYTES));
    printf("crc32   %08x\n", crc32(data, BYTES));
    printf("murmur3 %08x\n", murmur3(data, BYTES, 42));
    printf("words   sum %08x xor %08x max %08x\n", sum32, xor32, max32);
    printf("longs   sum %016llx bits %u\n", (unsigned long long)sum64, bits);
    printf("tables  %016llx %016llx\n", (unsigned long long)fnv1a(words, sizeof words),
           (unsigned long long)fnv1a(longs, sizeof longs));
    return 0;
}
