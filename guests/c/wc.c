/* Word count of standard input, with arguments and environment: `wc [-u] [WORD...]` prints lines,
 * words and bytes, how often each WORD occurs, and with -u counts upper-case letters too.
 * WC_PREFIX in the environment is printed before each line. Exit status: 0 if every WORD occurred,
 * 1 if not, 2 for an unknown option. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST 256

int main(int argc, char **argv) {
    const char *prefix = getenv("WC_PREFIX");
    int upper = argc > 1 && strcmp(argv[1], "-u") == 0, first = 1 + upper, missing = 0;
    unsigned long lines = 0, words = 0, bytes = 0, capitals = 0;
    unsigned long *seen = calloc((size_t)argc + 1, sizeof *seen);
    char word[LONGEST];
    size_t length = 0;
    int c;

    if (!prefix) prefix = "";
    if (!seen) return 3;
    if (first < argc && argv[first][0] == '-') {
        fprintf(stderr, "wc: unknown option %s\n", argv[first]);
        return 2;
    }
    do {
        c = getchar();
        if (c != EOF) bytes++;
        lines += c == '\n';
        capitals += c != EOF && isupper(c);
        if (c != EOF && !isspace(c)) {
            if (length < LONGEST - 1) word[length++] = (char)c;
        } else if (length) {
            word[length] = 0;
            words++;
            for (int i = first; i < argc; i++) seen[i] += strcmp(argv[i], word) == 0;
            length = 0;
        }
    } while (c != EOF);
    printf("%s%lu lines %lu words %lu bytes\n", prefix, lines, words, bytes);
    if (upper) printf("%s%lu capitals\n", prefix, capitals);
    for (int i = first; i < argc; i++) {
        printf("%s%s: %lu\n", prefix, argv[i], seen[i]);
        missing |= !seen[i];
    }
    free(seen);
    return missing;
}
