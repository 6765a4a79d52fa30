/*
 * Runs a libFuzzer target without libFuzzer: every corpus input as it is, then deterministic mutations of it.
 *
 *     driver [-s SEED] [-n COUNT] [-m MAX] [FILE | DIRECTORY]...
 *
 * COUNT mutations are spread evenly over the corpus (and over the empty input, which is always part of it). The same
 * SEED, COUNT, MAX and corpus always give the same inputs in the same order. An input that crashes the target, trips
 * a sanitizer or runs for more than ten seconds is written to crash-<n> in the working directory, and the driver
 * fails; `driver -n 0 crash-<n>` runs it again.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TIME_LIMIT_S = 10, MOST_EDITS = 8, DEFAULT_MAX = 1 << 16 };

struct input {
    uint8_t *data;
    size_t size;
};

extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
extern int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));
extern void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static struct input *corpus;
static size_t corpus_count;
static size_t max_size = DEFAULT_MAX;
static uint64_t rng_state;

/* The input under test; read by the crash handlers. */
static const uint8_t *current_data;
static size_t current_size;
static unsigned long current_number;

static void die(const char *what)
{
    fprintf(stderr, "fuzz driver: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void *allocate(size_t size)
{
    void *memory = malloc(size ? size : 1);
    if (!memory)
        die("out of memory");
    return memory;
}

/* Called from signal handlers: async-signal-safe calls only, apart from snprintf of an integer. */
static void save_current(void)
{
    char name[64];
    const int length = snprintf(name, sizeof name, "crash-%lu", current_number);
    const int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return;
    for (size_t done = 0; done < current_size;) {
        const ssize_t n = write(fd, current_data + done, current_size - done);
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    close(fd);
    static const char text[] = "fuzz driver: the failing input is in ";
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0 || write(STDERR_FILENO, name, (size_t)length) < 0 ||
        write(STDERR_FILENO, "\n", 1) < 0)
        return;
}

static void on_signal(int number)
{
    save_current();
    signal(number, SIG_DFL);
    raise(number);
}

static void run(const uint8_t *data, size_t size)
{
    /* An exact-size heap copy lets AddressSanitizer see a read of one byte too many, also of an empty input. */
    uint8_t *copy = allocate(size);
    if (size)
        memcpy(copy, data, size);
    current_data = copy;
    current_size = size;
    current_number++;
    alarm(TIME_LIMIT_S);
    LLVMFuzzerTestOneInput(copy, size);
    alarm(0);
    free(copy);
}

/* splitmix64 */
static uint64_t rng(void)
{
    uint64_t z = (rng_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static size_t below(size_t bound)
{
    return bound ? (size_t)(rng() % bound) : 0;
}

/* Overwrites up to eight bytes with a number that length and count fields get wrong. */
static void edit_number(uint8_t *data, size_t size)
{
    static const uint64_t numbers[] = {
        0,          1,          0x7f,       0x80,       0xff,       0x100,
        0x7fff,     0x8000,     0xffff,     0x10000,    0x7fffffff, 0x80000000,
        0xffffffff, 0x100000000, INT64_MAX, (uint64_t)INT64_MAX + 1, UINT64_MAX, UINT64_MAX - 7,
    };
    const uint64_t number = numbers[below(sizeof numbers / sizeof numbers[0])];
    const size_t width = (size_t)1 << below(4);
    if (size < width)
        return;
    memcpy(data + below(size - width + 1), &number, width);
}

/* Replaces [at, at + cut) by `bytes`; keeps within max_size by dropping the tail. */
static size_t replace(uint8_t *data, size_t size, size_t at, size_t cut, const uint8_t *bytes, size_t count)
{
    if (count > max_size - at)
        count = max_size - at;
    size_t tail = size - at - cut;
    if (tail > max_size - at - count)
        tail = max_size - at - count;
    if (tail)
        memmove(data + at + count, data + at + cut, tail);
    if (count)
        memcpy(data + at, bytes, count);
    return at + count + tail;
}

static size_t mutate_once(uint8_t *data, size_t size)
{
    switch (below(7)) {
    case 0: /* flip a bit */
        if (size)
            data[below(size)] ^= (uint8_t)(1u << below(8));
        return size;
    case 1: /* set a byte */
        if (size)
            data[below(size)] = (uint8_t)rng();
        return size;
    case 2:
        edit_number(data, size);
        return size;
    case 3: /* truncate */
        return below(size + 1);
    case 4: { /* cut a piece out */
        const size_t at = below(size + 1);
        const size_t cut = below(size - at + 1);
        return replace(data, size, at, cut, NULL, 0);
    }
    case 5: { /* insert random bytes */
        uint8_t bytes[32];
        const size_t count = 1 + below(sizeof bytes);
        for (size_t i = 0; i < count; i++)
            bytes[i] = (uint8_t)rng();
        const size_t at = below(size + 1);
        return replace(data, size, at, 0, bytes, count);
    }
    default: { /* put a piece of another input in the place of a piece of this one */
        const struct input *other = &corpus[below(corpus_count)];
        const size_t from = below(other->size + 1);
        const size_t count = below(other->size - from + 1);
        const size_t at = below(size + 1);
        const size_t cut = below(size - at + 1);
        return replace(data, size, at, cut, other->data + from, count);
    }
    }
}

static void add_input(uint8_t *data, size_t size)
{
    struct input *grown = realloc(corpus, (corpus_count + 1) * sizeof *corpus);
    if (!grown)
        die("out of memory");
    corpus = grown;
    corpus[corpus_count++] = (struct input){.data = data, .size = size};
}

static void add_file(const char *path)
{
    FILE *file = fopen(path, "rbe");
    if (!file)
        die(path);
    uint8_t *data = allocate(max_size);
    const size_t size = fread(data, 1, max_size, file);
    if (ferror(file))
        die(path);
    fclose(file);
    add_input(data, size);
}

static int visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* In the order of names (alphasort follows the locale, which main leaves at "C"): the run must be repeatable. */
static void add_path(const char *path)
{
    struct stat status;
    if (stat(path, &status) < 0)
        die(path);
    if (!S_ISDIR(status.st_mode)) {
        add_file(path);
        return;
    }
    struct dirent **entries;
    const int count = scandir(path, &entries, visible, alphasort);
    if (count < 0)
        die(path);
    for (int i = 0; i < count; i++) {
        char *child;
        if (asprintf(&child, "%s/%s", path, entries[i]->d_name) < 0)
            die("out of memory");
        add_path(child);
        free(child);
        free(entries[i]);
    }
    free(entries);
}

static unsigned long number_argument(const char *text)
{
    char *end;
    errno = 0;
    const unsigned long value = strtoul(text, &end, 10);
    if (errno || *end || end == text || *text == '-') {
        fprintf(stderr, "fuzz driver: not a number: %s\n", text);
        exit(2);
    }
    return value;
}

int main(int argc, char **argv)
{
    unsigned long seed = 1, count = 0;

    for (int option; (option = getopt(argc, argv, "s:n:m:")) != -1;) {
        switch (option) {
        case 's': seed = number_argument(optarg); break;
        case 'n': count = number_argument(optarg); break;
        case 'm': max_size = number_argument(optarg); break;
        default: fprintf(stderr, "usage: %s [-s SEED] [-n COUNT] [-m MAX] [FILE | DIRECTORY]...\n", argv[0]); return 2;
        }
    }
    add_input(allocate(0), 0);
    for (int i = optind; i < argc; i++)
        add_path(argv[i]);

    if (LLVMFuzzerInitialize)
        LLVMFuzzerInitialize(&argc, &argv);
    /* Sanitizers report first and call back; a plain build has only the signals. */
    const bool sanitized = __sanitizer_set_death_callback != NULL;
    if (sanitized) {
        __sanitizer_set_death_callback(save_current);
    } else {
        signal(SIGSEGV, on_signal);
        signal(SIGBUS, on_signal);
        signal(SIGABRT, on_signal);
    }
    signal(SIGALRM, on_signal);

    for (size_t i = 0; i < corpus_count; i++)
        run(corpus[i].data, corpus[i].size);

    uint8_t *data = allocate(max_size);
    rng_state = seed;
    for (unsigned long i = 0; i < count; i++) {
        const struct input *parent = &corpus[i % corpus_count];
        size_t size = parent->size;
        if (size)
            memcpy(data, parent->data, size);
        for (size_t edits = 1 + below(MOST_EDITS); edits; edits--)
            size = mutate_once(data, size);
        run(data, size);
    }

    free(data);
    printf("%s: %zu inputs and %lu mutations (seed %lu): no fault\n", program_invocation_short_name, corpus_count, count,
           seed);
    for (size_t i = 0; i < corpus_count; i++)
        free(corpus[i].data);
    free(corpus);
    return 0;
}
