/* The C library's string functions over 1 MB of text. A libc that chooses its implementations by
 * CPUID (glibc) runs its AVX2 ones here where CPUID offers AVX2, whatever this file is built for. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <wchar.h>

#ifndef SIZE
#define SIZE (1 << 20) /* a power of two from 16 KiB on */
#endif
#define PAGE 4096

static char text[SIZE + 64], copy[SIZE + 64];
static wchar_t wide[PAGE];
static const char *const vocabulary[] = {"the", "quick", "brown", "fox", "jumps", "over", "a",
                                         "lazy", "dog", "while", "vectors", "shuffle", "onwards"};
/* Through a volatile pointer, so that no call is computed by the compiler. */
static char *volatile hidden_text = text, *volatile hidden_copy = copy;

static void make_text(char *out) {
    uint32_t seed = 2463534242u;
    size_t used = 0;
    while (used < PAGE) {
        seed = seed * 1664525 + 1013904223;
        const char *word = vocabulary[(seed >> 16) % 13];
        size_t length = strlen(word);
        if (used + length + 1 > PAGE) break;
        memcpy(out + used, word, length);
        used += length;
        out[used++] = seed >> 28 ? ' ' : '\n';
    }
    memset(out + used, '.', PAGE - used);
    for (size_t done = PAGE; done < SIZE; done *= 2) memcpy(out + done, out, done);
    out[SIZE] = 0;
}

static uint64_t fnv1a(const char *p, size_t size) {
    uint64_t hash = 0xcbf29ce484222325u;
    while (size--) hash = (hash ^ (uint8_t)*p++) * 0x100000001b3u;
    return hash;
}

static long at(const char *base, const void *found) {
    return found ? (long)((const char *)found - base) : -1;
}

static int sign(int value) { return (value > 0) - (value < 0); }

int main(void) {
    char *t = hidden_text, *c = hidden_copy;
    make_text(t);
    memcpy(t + SIZE - 300, "needle#in?haystack", 18);
    printf("strlen   %zu strnlen %zu\n", strlen(t), strnlen(t, 777777));
    printf("memchr   %ld %ld\n", at(t, memchr(t, '#', SIZE)), at(t, memchr(t, 0x7f, SIZE)));
    printf("strchr   %ld strrchr %ld\n", at(t, strchr(t, '?')), at(t, strrchr(t, '#')));
    printf("memrchr  %ld strchrnul %ld\n", at(t, memrchr(t, '\n', SIZE)), at(t, strchrnul(t, '?')));
    printf("strstr   %ld memmem %ld\n", at(t, strstr(t, "needle#in")),
           at(t, memmem(t, SIZE, "haystack", 8)));
    memcpy(c, t, SIZE + 1);
    printf("memcmp   %d strcmp %d\n", memcmp(t, c, SIZE), strcmp(t, c));
    c[SIZE - 5] ^= 0x20;
    printf("memcmp   %d strcmp %d strncmp %d\n", sign(memcmp(t, c, SIZE)), sign(strcmp(t, c)),
           sign(strncmp(t, c, SIZE - 5)));
    memmove(c + 33, c, SIZE / 2);
    memmove(c + 7, c + 100, SIZE / 2);
    printf("memmove  %016llx\n", (unsigned long long)fnv1a(c, SIZE));
    memset(c + 1, 'x', SIZE / 4);
    *(char *)mempcpy(c, "head ", 5) = '_';
    strcpy(c + SIZE / 2, t + SIZE - 5000);
    printf("strcpy   %zu %016llx\n", strlen(c), (unsigned long long)fnv1a(c, SIZE));
    strcat(c + SIZE / 2, " tail");
    strncpy(c + 64, t, 1000);
    stpcpy(c + 2000, "stpcpy");
    printf("strcat   %zu %016llx\n", strlen(c + SIZE / 2), (unsigned long long)fnv1a(c, SIZE));
    t[3000] = '!';
    printf("strspn   %zu strcspn %zu strpbrk %ld\n", strspn(t, "abcdefghijklmnopqrstuvwxyz \n"),
           strcspn(t, "!#"), at(t, strpbrk(t, "#!?")));
    for (int i = 0; i < 200; i++) c[i] = t[i] >= 'a' && t[i] <= 'z' ? (char)(t[i] - 32) : t[i];
    c[200] = t[200] = 0;
    printf("casecmp  %d %d\n", strcasecmp(t, c), sign(strncasecmp(t + 1, c, 150)));
    for (int i = 0; i < PAGE - 1; i++) wide[i] = L'a' + i % 23;
    wide[4000] = L'!';
    wide[PAGE - 1] = 0;
    printf("wide     %zu %ld %ld\n", wcslen(wide), (long)(wcschr(wide, L'!') - wide),
           (long)(wmemchr(wide, L'w', PAGE) - wide));
    return 0;
}
