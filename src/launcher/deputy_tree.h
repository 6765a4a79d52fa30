/* What walking through a tree needs that others change meanwhile: its directories, and a set of files. */
#ifndef CORRAL_DEPUTY_TREE_H
#define CORRAL_DEPUTY_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

struct identity {
    uint64_t device, inode; /* inode 0: a free place */
    uint64_t name;
};

/* A set, by open addressing; never more than half full. */
struct set {
    struct identity *places;
    size_t size, used;
};

bool same_file(const struct stat *a, const struct stat *b);

/* Stands for a name in a directory, as long as the kernel knows that by the same number; never 0, which is any. */
uint64_t name_in(const struct stat *directory, const char *name);

bool set_has(const struct set *set, const struct stat *stat, uint64_t name);

/* 0, or -1 with errno. Whoever has the set frees its places. */
int set_add(struct set *set, const struct stat *stat, uint64_t name);

/* A directory in another, on the same mount, itself and no link to it. -1 with errno. */
int open_below(int at, const char *name);

#define TREE_MAX_NAMES (64u << 20) /* bytes: 131,072 of the longest, twice */

/* All names in a directory, each ended by NUL, the last by two: what is done to it while it is read may change what is
 * read. To be freed. NULL with errno; E2BIG beyond TREE_MAX_NAMES, as names may be added as fast as they are read. */
char *list_names(int directory);
const char *next_name(const char *name);

#endif
