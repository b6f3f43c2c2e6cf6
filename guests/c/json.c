/* A recursive-descent JSON parser: parses a generated document of about 60 KB, counts values by
 * type, sums the numbers and rejects malformed input. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct parser {
    const char *at, *end;
    int depth, deepest;
    unsigned objects, arrays, strings, numbers, literals;
    uint64_t text_hash;
    double sum;
};

static int value(struct parser *p);

static void space(struct parser *p) {
    while (p->at < p->end && strchr(" \t\r\n", *p->at)) p->at++;
}

static int take(struct parser *p, char wanted) {
    space(p);
    if (p->at == p->end || *p->at != wanted) return 0;
    p->at++;
    return 1;
}

static int string(struct parser *p) {
    if (!take(p, '"')) return 0;
    const char *close = memchr(p->at, '"', (size_t)(p->end - p->at));
    while (close && close[-1] == '\\')
        close = memchr(close + 1, '"', (size_t)(p->end - close - 1));
    if (!close) return 0;
    for (; p->at < close; p->at++) p->text_hash = (p->text_hash ^ (uint8_t)*p->at) * 0x100000001b3u;
    p->at++;
    p->strings++;
    return 1;
}

static int number(struct parser *p) {
    char *end;
    double parsed = strtod(p->at, &end);
    if (end == p->at || end > p->end) return 0;
    p->at = end;
    p->sum += parsed;
    p->numbers++;
    return 1;
}

static int literal(struct parser *p, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(p->end - p->at) < length || memcmp(p->at, word, length)) return 0;
    p->at += length;
    p->literals++;
    return 1;
}

static int members(struct parser *p, char close, int named) {
    if (++p->depth > p->deepest) p->deepest = p->depth;
    if (!take(p, close)) {
        do {
            if (named && !(string(p) && take(p, ':'))) return 0;
            if (!value(p)) return 0;
        } while (take(p, ','));
        if (!take(p, close)) return 0;
    }
    p->depth--;
    return 1;
}

static int value(struct parser *p) {
    space(p);
    if (p->at == p->end || p->depth > 100) return 0;
    switch (*p->at) {
    case '{': p->at++, p->objects++; return members(p, '}', 1);
    case '[': p->at++, p->arrays++; return members(p, ']', 0);
    case '"': return string(p);
    case 't': return literal(p, "true");
    case 'f': return literal(p, "false");
    case 'n': return literal(p, "null");
    default: return number(p);
    }
}

static int parse(const char *text, size_t size, struct parser *p) {
    *p = (struct parser){.at = text, .end = text + size, .text_hash = 0xcbf29ce484222325u};
    return value(p) && (space(p), p->at == p->end);
}

#ifndef RECORDS
#define RECORDS 500
#endif

int main(void) {
    static const char *const bad[] = {"", "{", "[1,]", "{\"a\" 1}", "tru", "[1 2]", "\"open"};
    static char text[100000];
    struct parser p;
    size_t used = (size_t)sprintf(text, "[");
    for (int i = 0; i < RECORDS; i++)
        used += (size_t)sprintf(text + used,
                                "%s\n {\"id\": %d, \"name\": \"item \\\"%d\\\"\", \"ok\": %s, "
                                "\"price\": %d.%02d, \"tags\": [\"a%d\", null, [%de-3]], \"sub\": {}}",
                                i ? "," : "", i, i * i, i % 3 ? "true" : "false", i * 7, i % 100,
                                i % 10, i);
    used += (size_t)sprintf(text + used, "]");
    int whole = parse(text, used, &p);
    printf("parsed %d of %zu bytes, depth %d\n", whole, used, p.deepest);
    printf("objects %u arrays %u strings %u numbers %u literals %u\n", p.objects, p.arrays,
           p.strings, p.numbers, p.literals);
    printf("sum %.6f text %016llx\n", p.sum, (unsigned long long)p.text_hash);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        printf("%s", parse(bad[i], strlen(bad[i]), &p) ? "accepted " : "rejected ");
    putchar('\n');
    return 0;
}
