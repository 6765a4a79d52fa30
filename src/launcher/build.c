#include "build.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "kernel.h"
#include "locks.h"
#include "network.h"
#include "wire.h"

/* A path inside the new root never leaves it, whatever links an unpacked root file system holds. */
static int open_inside(int root, const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    while (*path == '/')
        path++;
    return sys_openat2(root, *path ? path : ".", &how);
}

/* Splits off the last name: opens its directory, leaves the name in `*name`. */
static int open_parent(int root, const char *path, const char **name)
{
    char directory[4096];
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) : 0;
    *name = slash ? slash + 1 : path;
    if (length >= sizeof directory) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(directory, path, length);
    directory[length] = '\0';
    return open_inside(root, directory, O_PATH | O_DIRECTORY);
}

/* Attaches a detached mount in a corner of the host's tree that no step opens a path in (sources are open by then), so
 * that overlays accept it as attached; gone when the old root is detached after the pivot. */
static int attach_aside(int mount_fd)
{
    return sys_move_mount(mount_fd, "", AT_FDCWD, "/dev", MOVE_MOUNT_F_EMPTY_PATH);
}

/* The new root goes over the old one, where nothing else does: a later mount at the same place would lie on top of it. */
static int attach_root(int mount_fd)
{
    return sys_move_mount(mount_fd, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH);
}

static int attach_inside(struct building *building, int mount_fd, const char *target)
{
    int at = open_inside(building->root, target, O_PATH);
    if (at < 0)
        return -1;
    int result = sys_move_mount(mount_fd, "", at, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int error = errno;
    close(at);
    errno = error;
    return result;
}

static int make_tmpfs(uint64_t bytes, uint64_t inodes)
{
    char number[32];
    int context = sys_fsopen("tmpfs");
    if (context < 0)
        return -1;
    snprintf(number, sizeof number, "%llu", (unsigned long long)bytes);
    int failed = sys_fsconfig(context, FSCONFIG_SET_STRING, "size", number, 0) < 0;
    snprintf(number, sizeof number, "%llu", (unsigned long long)inodes);
    failed = failed || sys_fsconfig(context, FSCONFIG_SET_STRING, "nr_inodes", number, 0) < 0;
    failed = failed || sys_fsconfig(context, FSCONFIG_SET_STRING, "mode", "0755", 0) < 0;
    failed = failed || sys_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0;
    int fd = failed ? -1 : sys_fsmount(context, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    int error = errno;
    close(context);
    errno = error;
    return fd;
}

static int add_layer(struct building *building, const struct step *step)
{
    building->layer = make_tmpfs(step->number[0], step->number[1]);
    if (building->layer < 0 || attach_aside(building->layer) < 0)
        return -1;
    /* An fsmount descriptor is O_PATH-like in use; the controller needs one that it can list. */
    int listed = openat(building->layer, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    close(building->layer);
    building->layer = listed;
    return listed < 0 ? -1 : 0;
}

static int add_layer_directory(struct building *building, const struct step *step)
{
    const char *path = step->text[0];
    if (mkdirat(building->layer, path, 0700) < 0)
        return -1;
    if (fchownat(building->layer, path, (uid_t)step->number[1], (gid_t)step->number[2], AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    return fchmodat(building->layer, path, (mode_t)step->number[0], 0);
}

static int add_root(struct building *building, const struct step *step)
{
    building->root = make_tmpfs(step->number[0], step->number[1]);
    return building->root < 0 ? -1 : attach_root(building->root);
}

static int add_directory(struct building *building, const struct step *step)
{
    const char *name;
    int at = open_parent(building->root, step->text[0], &name);
    if (at < 0)
        return -1;
    int result = mkdirat(at, name, (mode_t)step->number[0]);
    int error = errno;
    close(at);
    errno = error;
    return result < 0 && error == EEXIST ? 0 : result;
}

static int add_symlink(struct building *building, const struct step *step)
{
    const char *name;
    int at = open_parent(building->root, step->text[1], &name);
    if (at < 0)
        return -1;
    int result = symlinkat(step->text[0], at, name);
    int error = errno;
    close(at);
    errno = error;
    return result;
}

static int add_file(struct building *building, const struct step *step)
{
    const char *name;
    int at = open_parent(building->root, step->text[0], &name);
    if (at < 0)
        return -1;
    int file = openat(at, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    int error = errno;
    close(at);
    errno = error;
    if (file < 0) /* an empty file is only a place to mount on: what is there already serves as well */
        return error == EEXIST && step->length == 0 ? 0 : -1;
    ssize_t written = write(file, step->bytes, step->length);
    int result = written == (ssize_t)step->length ? fchmod(file, (mode_t)step->number[0]) : -1;
    error = errno;
    close(file);
    errno = error;
    return result;
}

/* Overlay options name descriptors: paths of any length and with any character work, and the mount table inside
 * tells nothing about the host. userxattr is what a user namespace may use (overlayfs.rst, "User xattr"). Without a
 * work directory there is nothing to write to: a read-only view. */
static int make_overlay(const char *lowers, int upper, int work)
{
    char upper_path[64], work_path[64];
    uint64_t attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (work < 0 ? MOUNT_ATTR_RDONLY : 0);
    snprintf(upper_path, sizeof upper_path, "/proc/self/fd/%d", upper);
    snprintf(work_path, sizeof work_path, "/proc/self/fd/%d", work);
    int context = sys_fsopen("overlay");
    if (context < 0)
        return -1;
    int failed = sys_fsconfig(context, FSCONFIG_SET_FLAG, "userxattr", NULL, 0) < 0;
    failed = failed || sys_fsconfig(context, FSCONFIG_SET_STRING, "lowerdir", lowers, 0) < 0;
    if (work >= 0) {
        failed = failed || sys_fsconfig(context, FSCONFIG_SET_STRING, "upperdir", upper_path, 0) < 0;
        failed = failed || sys_fsconfig(context, FSCONFIG_SET_STRING, "workdir", work_path, 0) < 0;
    }
    failed = failed || sys_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0;
    int fd = failed ? -1 : sys_fsmount(context, (unsigned)attributes);
    int error = errno;
    close(context);
    errno = error;
    return fd;
}

/* A kernel that cannot write to the upper directory mounts it read-only and says so nowhere but here. */
static int check_writable(int mount_fd)
{
    struct statvfs status;
    if (fstatvfs(mount_fd, &status) < 0)
        return -1;
    if (status.f_flag & ST_RDONLY) {
        errno = EROFS;
        return -1;
    }
    return 0;
}

static int add_overlay(struct building *building, const struct step *step)
{
    char lowers[256]; /* the longest string that fsconfig takes */
    size_t length = 0;
    const int *sources = building->sources + building->used;
    building->used += step->count;
    for (uint32_t i = 0; i < step->count; i++) {
        if (building->plan->prepare_outside && attach_aside(sources[i]) < 0)
            return -1;
        length += (size_t)snprintf(lowers + length, sizeof lowers - length, "%s/proc/self/fd/%d", i ? ":" : "",
                                   sources[i]);
        if (length >= sizeof lowers) {
            errno = ENAMETOOLONG;
            return -1;
        }
    }
    bool writable = step->text[2][0] != '\0';
    int work = -1, upper = openat(building->layer, step->text[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (upper < 0)
        return -1;
    if (writable) {
        work = openat(building->layer, step->text[2], O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (work < 0)
            return -1;
    } else {
        /* An overlay without an upper directory needs two lower ones; this one is empty. */
        length += (size_t)snprintf(lowers + length, sizeof lowers - length, ":/proc/self/fd/%d", upper);
        if (length >= sizeof lowers) {
            errno = ENAMETOOLONG;
            return -1;
        }
    }
    int fd = make_overlay(lowers, upper, work);
    if (fd < 0 || (writable && check_writable(fd) < 0))
        return -1;
    close(upper);
    if (writable)
        close(work);
    for (uint32_t i = 0; i < step->count; i++)
        close(sources[i]);
    if (strcmp(step->text[0], "/") == 0) {
        building->root = fd;
        return attach_root(fd);
    }
    if (attach_inside(building, fd, step->text[0]) < 0)
        return -1;
    return close(fd);
}

static int add_bind(struct building *building, const struct step *step)
{
    int fd;
    if (step->number[0] == ORIGIN_HOST) {
        fd = building->sources[building->used++];
    } else {
        int from = step->number[0] == ORIGIN_LAYER ? building->layer : building->root;
        const char *path = step->text[0];
        int at = open_inside(from, path, O_PATH | O_NOFOLLOW);
        if (at < 0)
            return -1;
        fd = sys_open_tree(at, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE);
        int error = errno;
        close(at);
        errno = error;
        struct mount_attr attr = {.attr_set = MOUNT_ATTR_NOSUID};
        if (!(step->number[1] & BIND_DEVICES) && step->number[0] == ORIGIN_LAYER)
            attr.attr_set |= MOUNT_ATTR_NODEV;
        if (step->number[1] & BIND_READ_ONLY)
            attr.attr_set |= MOUNT_ATTR_RDONLY;
        if (step->number[1] & BIND_NO_EXEC)
            attr.attr_set |= MOUNT_ATTR_NOEXEC;
        if (fd < 0 || sys_mount_setattr(fd, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr) < 0)
            return -1;
    }
    int result = attach_inside(building, fd, step->text[1]);
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

static int add_special(struct building *building, const char *type, const char *target, const char *options, int flags)
{
    char at_target[64];
    int at = open_inside(building->root, target, O_PATH | O_DIRECTORY);
    if (at < 0)
        return -1;
    snprintf(at_target, sizeof at_target, "/proc/self/fd/%d", at);
    int result = mount(type, at_target, type, (unsigned long)flags, options);
    int error = errno;
    close(at);
    errno = error;
    return result;
}

/* hidepid hides from the first process too what it must find to end a session: processes of other users, and those
 * that made themselves not dumpable. So it keeps a proc of its own, attached nowhere. Only listing works with it once
 * Landlock is on, which knows no path to it. */
static int list_processes(struct building *building)
{
    int context = sys_fsopen("proc");
    if (context < 0)
        return -1;
    int failed = sys_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0;
    unsigned attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    int mount_fd = failed ? -1 : sys_fsmount(context, attributes);
    if (mount_fd >= 0)
        building->processes = openat(mount_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int error = errno;
    close(context);
    close(mount_fd);
    errno = error;
    return building->processes < 0 ? -1 : 0;
}

static int add_proc(struct building *building, const struct step *step)
{
    if (add_special(building, "proc", step->text[0], step->text[1], MS_NOSUID | MS_NODEV | MS_NOEXEC) < 0)
        return -1;
    return building->processes >= 0 ? 0 : list_processes(building);
}

static int set_sysctl(struct building *building, const struct step *step)
{
    char path[256];
    snprintf(path, sizeof path, "proc/sys/%s", step->text[0]);
    int fd = open_inside(building->root, path, O_WRONLY);
    if (fd < 0)
        return -1;
    size_t length = strlen(step->text[1]);
    int result = write(fd, step->text[1], length) == (ssize_t)length ? 0 : -1;
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

static int seal_root(struct building *building)
{
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};
    return sys_mount_setattr(building->root, "", AT_EMPTY_PATH, &attr);
}

/* pivot_root(2), "pivot_root(".", ".")": the old root ends up over the new one, and is detached with all below it. */
static int pivot(struct building *building)
{
    struct stat root, above;
    if (fchdir(building->root) < 0)
        return -1;
    if (syscall(SYS_pivot_root, ".", ".") < 0)
        return -1;
    if (umount2(".", MNT_DETACH) < 0)
        return -1;
    if (chdir("/") < 0)
        return -1;
    if (stat("/", &root) < 0 || stat("/..", &above) < 0)
        return -1;
    if (root.st_dev != above.st_dev || root.st_ino != above.st_ino) {
        building->detail = "the old root is still there";
        errno = EBUSY;
        return -1;
    }
    int fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    close(building->root);
    building->root = fd;
    building->pivoted = true;
    return 0;
}

/* A socket for the controller. */
static int add_socket(struct building *building, int fd)
{
    if (fd < 0)
        return -1;
    building->listeners[building->listening++] = fd;
    return 0;
}

static int apply(struct building *building, const struct step *step)
{
    switch (step->kind) {
    case STEP_ID_MAP:
    case STEP_CGROUP:
    case STEP_WALL_TIME:
    case STEP_REMOVE:
    case STEP_PREPARE:
        return 0; /* the keeper's */
    case STEP_LAYER:
        return add_layer(building, step);
    case STEP_LAYER_DIR:
        return add_layer_directory(building, step);
    case STEP_ROOT:
        return add_root(building, step);
    case STEP_DIRECTORY:
        return add_directory(building, step);
    case STEP_SYMLINK:
        return add_symlink(building, step);
    case STEP_FILE:
        return add_file(building, step);
    case STEP_OVERLAY:
        return add_overlay(building, step);
    case STEP_BIND:
        return add_bind(building, step);
    case STEP_PROC:
        return add_proc(building, step);
    case STEP_DEVPTS:
        return add_special(building, "devpts", step->text[0], step->text[1], MS_NOSUID | MS_NOEXEC);
    case STEP_MQUEUE:
        return add_special(building, "mqueue", step->text[0], NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC);
    case STEP_SYSCTL:
        return set_sysctl(building, step);
    case STEP_SEAL_ROOT:
        return seal_root(building);
    case STEP_PIVOT:
        return pivot(building);
    case STEP_HOSTNAME:
        return sethostname(step->text[0], strlen(step->text[0]));
    case STEP_LOOPBACK:
        return raise_loopback();
    case STEP_LISTEN:
        return add_socket(building, open_listener(step));
    case STEP_NETLINK:
        return send_netlink(step);
    case STEP_DATAGRAM:
        return add_socket(building, open_datagram(step));
    case STEP_RLIMIT:
        return set_rlimit(step);
    case STEP_LANDLOCK:
        return add_landlock(building, step, &building->detail);
    case STEP_AFFINITY:
        return set_affinity(step);
    case STEP_FILTER:
        errno = EEXIST; /* only one is installed */
        if (building->filter)
            return -1;
        building->filter = step;
        return 0;
    }
    errno = ENOSYS;
    return -1;
}

/* What no sandbox is one without, whatever the plan says; NULL when all is there. */
static const char *missing_wall(const struct building *building)
{
    if (!building->filter)
        return "the plan has no seccomp filter";
    if (!building->pivoted)
        return "the plan keeps the host's root";
    if (building->processes < 0)
        return "the plan has no proc";
    return NULL;
}

int build_walls(struct building *building)
{
    for (uint32_t i = 0; i < building->plan->count; i++) {
        const struct step *step = &building->plan->steps[i];
        building->failed = step;
        building->detail = step->text[0] ? step->text[0] : "";
        if (step->kind == STEP_BIND || step->kind == STEP_SYMLINK)
            building->detail = step->text[1];
        if (apply(building, step) < 0)
            return -1;
    }
    building->failed = NULL;
    building->detail = missing_wall(building);
    errno = EINVAL;
    return building->detail ? -1 : 0;
}
