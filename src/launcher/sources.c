#include "sources.h"

#include <errno.h>

#include "kernel.h"
#include "wire.h"

static uint64_t bind_attributes(uint64_t wanted)
{
    uint64_t attributes = MOUNT_ATTR_NOSUID;
    if (wanted & BIND_READ_ONLY)
        attributes |= MOUNT_ATTR_RDONLY;
    if (!(wanted & BIND_DEVICES))
        attributes |= MOUNT_ATTR_NODEV;
    if (wanted & BIND_NO_EXEC)
        attributes |= MOUNT_ATTR_NOEXEC;
    return attributes;
}

#define NO_IDMAP (-1)
#define LOST_IDMAP (-2) /* the plan asks for a map that it does not have */

static int find_idmap(const int userns[3], uint64_t idmap)
{
    if (idmap == IDMAP_NONE)
        return NO_IDMAP;
    return userns[idmap] >= 0 ? userns[idmap] : LOST_IDMAP;
}

static int restrict_mount(int fd, uint64_t attributes, int userns, unsigned recursive)
{
    struct mount_attr attr = {.attr_set = attributes};
    if (userns != NO_IDMAP) {
        attr.attr_set |= MOUNT_ATTR_IDMAP;
        attr.userns_fd = (uint64_t)(int64_t)userns; /* LOST_IDMAP: EINVAL */
    }
    return sys_mount_setattr(fd, "", AT_EMPTY_PATH | recursive, &attr);
}

/* A bind shows a tree with all that is mounted below it: a non-recursive clone would uncover what lies under those
 * mounts, and the kernel refuses it in a user namespace. */
static int open_bind(const char *path, uint64_t attributes, int userns)
{
    int fd = sys_open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
    if (fd >= 0 && restrict_mount(fd, bind_attributes(attributes), userns, AT_RECURSIVE) < 0) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* A lower directory is only read, through the overlay. It needs a mount of its own where ids are mapped. */
static int open_lower(const char *path, int outside, int userns)
{
    if (!outside && userns == NO_IDMAP)
        return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int fd = sys_open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (fd >= 0 && restrict_mount(fd, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, userns, 0) < 0) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

const char *open_sources(const struct plan *plan, const int userns[3], int *fds, const char **step_found)
{
    uint32_t opened = 0;
    for (uint32_t i = 0; i < plan->count; i++) {
        const struct step *step = &plan->steps[i];
        *step_found = step_name(step->kind);
        if (step->kind == STEP_BIND && step->number[0] == ORIGIN_HOST) {
            fds[opened] = open_bind(step->text[0], step->number[1], find_idmap(userns, step->number[2]));
            if (fds[opened++] < 0)
                return step->text[0];
        } else if (step->kind == STEP_OVERLAY) {
            struct cursor items = step_items(step);
            for (uint32_t lower = 0; lower < step->count; lower++) {
                uint32_t idmap = take_u32(&items);
                const char *path = take_string(&items);
                fds[opened] = open_lower(path, plan->prepare_outside, find_idmap(userns, idmap));
                if (fds[opened++] < 0)
                    return path;
            }
        }
    }
    return NULL;
}
