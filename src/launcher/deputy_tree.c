#include "deputy_tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel.h"

#define PAGE 4096u

/* ---- sets ---- */

static struct identity *find(const struct set *set, const struct identity *file)
{
    size_t at = (size_t)((file->inode * 0x9E3779B97F4A7C15u) ^ file->device ^ file->name) & (set->size - 1);
    while (set->places[at].inode && (set->places[at].inode != file->inode || set->places[at].device != file->device ||
                                     set->places[at].name != file->name))
        at = (at + 1) & (set->size - 1);
    return &set->places[at];
}

bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

uint64_t name_in(const struct stat *directory, const char *name)
{
    uint64_t hash = 0xCBF29CE484222325u ^ directory->st_ino; /* FNV-1a */
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001B3u;
    return hash | 1;
}

bool set_has(const struct set *set, const struct stat *stat, uint64_t name)
{
    const struct identity file = {stat->st_dev, stat->st_ino, name};
    return set->size && find(set, &file)->inode;
}

int set_add(struct set *set, const struct stat *stat, uint64_t name)
{
    const struct identity file = {stat->st_dev, stat->st_ino, name};
    if (set->used * 2 >= set->size) {
        struct set larger = {.size = set->size ? set->size * 2 : 1024, .used = set->used};
        larger.places = calloc(larger.size, sizeof *larger.places);
        if (!larger.places)
            return -1;
        for (size_t i = 0; i < set->size; i++)
            if (set->places[i].inode)
                *find(&larger, &set->places[i]) = set->places[i];
        free(set->places);
        *set = larger;
    }
    struct identity *place = find(set, &file);
    set->used += !place->inode;
    *place = file;
    return 0;
}

/* ---- directories ---- */

int open_below(int at, const char *name)
{
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK,
                           .resolve = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_BENEATH};
    return sys_openat2(at, name, &how);
}

char *list_names(int directory)
{
    size_t used = 0, size = PAGE;
    char *names = malloc(size);
    int copy = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = copy < 0 ? NULL : fdopendir(copy);
    if (!stream || !names) {
        int error = stream ? ENOMEM : errno;
        if (stream)
            closedir(stream);
        else if (copy >= 0)
            close(copy);
        free(names);
        errno = error;
        return NULL;
    }
    struct dirent *entry;
    while (errno = 0, (entry = readdir(stream))) {
        size_t length = strlen(entry->d_name) + 1;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (used + length + 1 > size) {
            if (size >= TREE_MAX_NAMES) {
                errno = E2BIG;
                break;
            }
            char *larger = realloc(names, size *= 2);
            if (!larger) {
                errno = ENOMEM;
                break;
            }
            names = larger;
        }
        memcpy(names + used, entry->d_name, length);
        used += length;
    }
    int error = errno;
    closedir(stream);
    names[used] = '\0';
    if (error) {
        free(names);
        errno = error;
        return NULL;
    }
    return names;
}

const char *next_name(const char *name)
{
    return name + strlen(name) + 1;
}
