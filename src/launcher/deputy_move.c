#include "deputy_move.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "deputy_tree.h"
#include "kernel.h"

#define OVERLAY_MAGIC 0x794c7630
#define NOREPLACE 1u /* RENAME_NOREPLACE */
#define PAGE 4096u
#define SPARE_INODES 16
#define ROUNDS 8 /* in which the old tree is emptied of what others put there meanwhile */
#define MAX_NAMES 65536
#define MAX_VALUE 65536
#define TREE "tree"   /* in the place: the new tree, until it has its name */
#define PICKED "file" /* in the place: what was taken from the old tree, and is looked at */
#define KEPT "kept-%u" /* in the place: what was put into the old tree meanwhile, and had no room in the new one */

static volatile sig_atomic_t ended;

struct move {
    struct set linked; /* files, and under which names of the old tree */
    uint64_t mount;        /* of the tree */
    uint64_t upper_device; /* of files that are new in the overlay: they need no room */
    uid_t uid;
    gid_t gid;
    uint64_t files, directories, bytes;
    int place; /* the directory in which all is made */
    struct stat here, tree; /* that directory, and the new tree */
    unsigned kept;
};

/* ---- whether it can be done ---- */

static int refuse(int error)
{
    errno = error;
    return -1;
}

static int look_at(struct move *move, int directory, unsigned depth);

static int look_at_entry(struct move *move, int directory, const char *name, unsigned depth)
{
    struct statx status;
    if (statx(directory, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_BASIC_STATS | STATX_MNT_ID, &status) < 0)
        return errno == ENOENT ? 0 : -1;
    if (ended)
        return refuse(EINTR);
    /* What is mounted there stays where it is. What is somebody else's cannot be made anew as it is. */
    if (status.stx_mnt_id != move->mount || status.stx_uid != move->uid)
        return refuse(EXDEV);
    if (++move->files > DEPUTY_MAX_MOVED)
        return refuse(EXDEV);
    if (S_ISREG(status.stx_mode) && ((uint64_t)status.stx_dev_major << 32 | status.stx_dev_minor) != move->upper_device) {
        uint64_t held = status.stx_blocks * 512 < status.stx_size ? status.stx_blocks * 512 : status.stx_size;
        move->bytes += (held + PAGE - 1) / PAGE * PAGE;
    }
    if (!S_ISDIR(status.stx_mode))
        return 0;
    if (status.stx_gid != move->gid || (status.stx_mode & 0500) != 0500 || depth == DEPUTY_MAX_DEPTH)
        return refuse(EXDEV);
    move->files--;
    if (++move->directories > DEPUTY_MAX_MOVED)
        return refuse(EXDEV);
    int below = open_below(directory, name);
    if (below < 0)
        return errno == ENOENT || errno == ENOTDIR || errno == ELOOP ? 0 : -1;
    int result = look_at(move, below, depth + 1);
    int error = errno;
    close(below);
    errno = error;
    return result;
}

static int look_at(struct move *move, int directory, unsigned depth)
{
    char *names = list_names(directory);
    if (!names)
        return -1;
    int result = 0;
    for (const char *name = names; *name && result == 0; name = next_name(name))
        result = look_at_entry(move, directory, name, depth);
    int error = errno;
    free(names);
    errno = error;
    return result;
}

/* Of a file that lies in the overlay's upper tree alone. */
static int find_upper_device(struct move *move)
{
    struct statx status;
    int fd = openat(move->place, PICKED, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    int result = statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &status);
    int error = errno;
    close(fd);
    if (unlinkat(move->place, PICKED, 0) < 0)
        return -1;
    errno = error;
    move->upper_device = (uint64_t)status.stx_dev_major << 32 | status.stx_dev_minor;
    return result;
}

/* A link is an inode to a tmpfs, and so is what the overlay puts in the place of a file that is taken away. */
static int check_room(const struct move *move)
{
    struct statvfs room;
    if (fstatvfs(move->place, &room) < 0)
        return -1;
    uint64_t inodes = 2 * move->files + 3 * move->directories + SPARE_INODES;
    uint64_t bytes = move->bytes + (move->directories + SPARE_INODES) * PAGE;
    if (room.f_blocks && (bytes + room.f_frsize - 1) / room.f_frsize > room.f_bavail)
        return refuse(ENOSPC);
    return room.f_files && inodes > room.f_favail ? refuse(ENOSPC) : 0;
}

/* ---- making it anew ---- */

static bool is_acl(const char *name)
{
    return strcmp(name, "system.posix_acl_access") == 0 || strcmp(name, "system.posix_acl_default") == 0;
}

static int copy_attributes(int from, int to)
{
    static char names[MAX_NAMES], value[MAX_VALUE];
    static const char *const inherited[] = {"system.posix_acl_access", "system.posix_acl_default"};
    for (size_t i = 0; i < sizeof inherited / sizeof inherited[0]; i++)
        if (fremovexattr(to, inherited[i]) < 0 && errno != ENODATA && errno != EOPNOTSUPP)
            return -1;
    ssize_t length = flistxattr(from, names, sizeof names);
    if (length < 0)
        return errno == EOPNOTSUPP ? 0 : -1;
    for (const char *name = names; name < names + length; name = next_name(name)) {
        if (strncmp(name, "user.", 5) != 0 && !is_acl(name))
            continue; /* a label is given by the kernel */
        ssize_t size = fgetxattr(from, name, value, sizeof value);
        if (size < 0 || fsetxattr(to, name, value, (size_t)size, 0) < 0)
            return -1;
    }
    return 0;
}

/* As `status` says; the times last. `more` are bits of the mode that are taken away later. */
static int dress(int from, int to, const struct stat *status, mode_t more)
{
    const struct timespec times[2] = {status->st_atim, status->st_mtim};
    struct stat now;
    if (fstat(to, &now) < 0 || (now.st_gid != status->st_gid && fchown(to, (uid_t)-1, status->st_gid) < 0))
        return -1;
    if (copy_attributes(from, to) < 0 || fchmod(to, (status->st_mode & 07777) | more) < 0)
        return -1;
    return futimens(to, times);
}

static int fill(struct move *move, int from, int to);

/* Whether somebody has put the target into the tree since: it would be made anew in itself, without end. */
static bool is_here(const struct move *move, const struct stat *status)
{
    errno = EXDEV;
    return same_file(status, &move->here);
}

/* A directory of the same name. What has gone meanwhile is gone. */
static int make_directory(struct move *move, int from, int to, const char *name)
{
    struct stat status;
    int old = open_below(from, name);
    if (old < 0)
        return errno == ENOENT || errno == ENOTDIR || errno == ELOOP ? 0 : -1;
    int made = -1, result = -1;
    if (fstat(old, &status) == 0 && !is_here(move, &status) && mkdirat(to, name, 0700) == 0 &&
        (made = open_below(to, name)) >= 0 && fill(move, old, made) == 0 && dress(old, made, &status, 0) == 0)
        result = 0;
    int error = errno;
    close(old);
    if (made >= 0)
        close(made);
    errno = error;
    return result;
}

static int fill_entry(struct move *move, int from, const struct stat *directory, int to, const char *name)
{
    const uint64_t old = name_in(directory, name);
    struct stat before, after, made;
    if (ended)
        return refuse(EINTR);
    if (fstatat(from, name, &before, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT ? 0 : -1;
    if (S_ISDIR(before.st_mode))
        return make_directory(move, from, to, name);
    if (linkat(from, name, to, name, 0) < 0)
        return errno == ENOENT ? 0 : -1;
    if (fstatat(to, name, &made, AT_SYMLINK_NOFOLLOW) < 0 || set_add(&move->linked, &made, 0) < 0 ||
        set_add(&move->linked, &made, old) < 0)
        return -1;
    /* Under its old name it may have the number of the file that was copied up. If it has neither, it is another by now. */
    if (fstatat(from, name, &after, AT_SYMLINK_NOFOLLOW) < 0 || !same_file(&before, &after))
        return 0;
    return set_add(&move->linked, &after, 0) < 0 ? -1 : set_add(&move->linked, &after, old);
}

static int fill(struct move *move, int from, int to)
{
    struct stat directory;
    char *names = fstat(from, &directory) < 0 ? NULL : list_names(from);
    if (!names)
        return -1;
    int result = 0;
    for (const char *name = names; *name && result == 0; name = next_name(name))
        result = fill_entry(move, from, &directory, to, name);
    int error = errno;
    free(names);
    errno = error;
    return result;
}

/* ---- taking a tree away ---- */

/* Takes away what was linked, and directories that are empty then. What others have put there stays, and so does what is
 * around it. */
static void take_away(struct move *move, int directory)
{
    char *names = list_names(directory);
    if (!names)
        return;
    for (const char *name = names; *name; name = next_name(name)) {
        struct stat status;
        if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        if (S_ISDIR(status.st_mode)) {
            int below = open_below(directory, name);
            if (below < 0)
                continue;
            if ((status.st_mode & 0700) != 0700)
                fchmod(below, 0700);
            take_away(move, below);
            close(below);
            unlinkat(directory, name, AT_REMOVEDIR);
        } else if (set_has(&move->linked, &status, 0))
            unlinkat(directory, name, 0);
    }
    free(names);
}

static int rename_new(int from, const char *old, int to, const char *new)
{
    return (int)syscall(SYS_renameat2, from, old, to, new, NOREPLACE);
}

static bool is_later(const struct timespec *one, const struct timespec *other)
{
    return one->tv_sec != other->tv_sec ? one->tv_sec > other->tv_sec : one->tv_nsec > other->tv_nsec;
}

/* Whether a file of the old tree is in the new one, or another has taken its place there. One that has got another name in
 * the old tree since, `where`, is not: what has its old name by now may take its place. */
static bool is_had(const struct move *move, const struct stat *old, uint64_t where, int to, const char *name)
{
    struct stat new;
    if (set_has(&move->linked, old, where))
        return true;
    if (to < 0 || fstatat(to, name, &new, AT_SYMLINK_NOFOLLOW) < 0)
        return false;
    return same_file(old, &new) || (!set_has(&move->linked, &new, 0) && is_later(&new.st_mtim, &old->st_mtim));
}

/* One file of the old tree. It is looked at where nobody reaches it by its old name any more: if it is not what was linked,
 * somebody has put it there since, and it is the tree's. Where it can go nowhere it stays in the place. */
static void let_go(struct move *move, int from, const struct stat *directory, int to, const char *name)
{
    struct stat status;
    if (renameat(from, name, move->place, PICKED) < 0 ||
        fstatat(move->place, PICKED, &status, AT_SYMLINK_NOFOLLOW) < 0)
        return;
    if (is_had(move, &status, name_in(directory, name), to, name)) {
        unlinkat(move->place, PICKED, 0);
        return;
    }
    if ((to >= 0 && renameat(move->place, PICKED, to, name) == 0) || rename_new(move->place, PICKED, from, name) == 0)
        return;
    char kept[sizeof KEPT + 10];
    do
        snprintf(kept, sizeof kept, KEPT, move->kept++);
    while (rename_new(move->place, PICKED, move->place, kept) < 0 && errno == EEXIST);
}

/* Whether it is made by the move: somebody may have put the target into the old tree since. */
static bool is_own(const struct move *move, int directory)
{
    struct stat status;
    return fstat(directory, &status) < 0 || same_file(&status, &move->here) || same_file(&status, &move->tree);
}

static void empty(struct move *move, int from, int to)
{
    struct stat status, directory;
    char *names = fstat(from, &directory) < 0 ? NULL : list_names(from);
    if (!names)
        return;
    if ((directory.st_mode & 0700) != 0700)
        fchmod(from, directory.st_mode | 0700);
    for (const char *name = names; *name; name = next_name(name)) {
        if (fstatat(from, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        if (!S_ISDIR(status.st_mode)) {
            let_go(move, from, &directory, to, name);
            continue;
        }
        int old = open_below(from, name), new = to < 0 ? -1 : open_below(to, name);
        if (old >= 0 && new < 0 && to >= 0 && errno == ENOENT && renameat(from, name, to, name) == 0) {
            close(old); /* somebody has made it since */
            continue;
        }
        if (old >= 0) {
            if (!is_own(move, old)) {
                empty(move, old, new);
                unlinkat(from, name, AT_REMOVEDIR);
            }
            close(old);
        }
        if (new >= 0)
            close(new);
    }
    free(names);
}

/* ---- the move ---- */

static bool same(int directory, const char *name, int fd)
{
    struct stat one, other;
    return fstatat(directory, name, &one, AT_SYMLINK_NOFOLLOW) == 0 && fstat(fd, &other) == 0 &&
           same_file(&one, &other);
}

/* rename(2) looks at this only after it has refused the move. */
static int check_target(int directory, const char *name)
{
    struct stat status;
    if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT ? 0 : -1;
    if (!S_ISDIR(status.st_mode))
        return refuse(ENOTDIR);
    int fd = open_below(directory, name);
    if (fd < 0)
        return errno == EACCES ? 0 : -1; /* then the rename at the end says it */
    char *names = list_names(fd);
    bool is_empty = names && !*names;
    int error = names ? ENOTEMPTY : errno;
    free(names);
    close(fd);
    return is_empty ? 0 : refuse(error);
}

/* Until it gets its name a move fails for want of room or rights, or because it was ended. */
static int refuse_made(int error)
{
    bool is_told = error == ENOSPC || error == EDQUOT || error == ENOMEM || error == EIO || error == EINTR;
    return refuse(is_told ? error : EXDEV);
}

static int make_and_name(struct move *move, int source, const struct deputy_message *message, const int *fds)
{
    struct stat status;
    if (find_upper_device(move) < 0 || look_at(move, source, 0) < 0 || check_room(move) < 0)
        return refuse_made(errno);
    if (fstat(source, &status) < 0 || mkdirat(move->place, TREE, 0700) < 0)
        return refuse_made(errno);
    int tree = open_below(move->place, TREE);
    if (tree < 0)
        return refuse_made(errno);
    int result = -1;
    /* The directory itself must be writable for its parent to change (rename(2), EACCES). */
    if (fstat(tree, &move->tree) < 0 || fill(move, source, tree) < 0 || dress(source, tree, &status, 0200) < 0)
        refuse_made(errno);
    else {
        if (ended || !same(fds[0], message->path, source))
            errno = ended ? EINTR : ENOENT;
        else
            result = (int)syscall(SYS_renameat2, move->place, TREE, fds[1], message->second, message->request.flags);
    }
    int error = errno;
    if (result < 0)
        take_away(move, tree);
    else {
        if (!(status.st_mode & 0200))
            fchmod(tree, status.st_mode & 07777);
        for (int round = 0; round < ROUNDS; round++) {
            empty(move, source, tree);
            if (unlinkat(fds[0], message->path, AT_REMOVEDIR) == 0 || errno != ENOTEMPTY)
                break;
        }
    }
    close(tree);
    errno = error;
    return result;
}

bool deputy_may_move(const struct deputy_message *message, const int *fds)
{
    struct stat old, new, source;
    struct statfs system;
    return message->request.resolve && !(message->request.flags & ~NOREPLACE) && fstat(fds[0], &old) == 0 &&
           fstat(fds[1], &new) == 0 && old.st_dev == new.st_dev &&
           fstatat(fds[0], message->path, &source, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(source.st_mode) &&
           source.st_dev == old.st_dev && fstatfs(fds[0], &system) == 0 && system.f_type == OVERLAY_MAGIC;
}

static void end(int signal)
{
    (void)signal;
    ended = 1;
}

int deputy_heed_end(void)
{
    struct sigaction action = {.sa_handler = end};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM); /* the keeper, whose child the deputy is, has it blocked */
    return sigaction(SIGTERM, &action, NULL) < 0 ? -1 : sigprocmask(SIG_UNBLOCK, &set, NULL);
}

/* Where others may write to the directory around it, one of them may have put their own there: they would reach what is
 * made in it. */
static int check_place(struct move *move)
{
    if (fstat(move->place, &move->here) < 0)
        return -1;
    return move->here.st_uid == move->uid && (move->here.st_mode & 0777) == 0700 ? 0 : refuse(EXDEV);
}

static int move_to(const struct deputy_message *message, const int *fds, int source, struct deputy_result *result)
{
    struct move move = {.uid = geteuid(), .gid = getegid()};
    struct statx status;
    char place[sizeof DEPUTY_MOVE_PLACE + 16];

    if (statx(source, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_MNT_ID, &status) < 0)
        return -1;
    if (status.stx_uid != move.uid || status.stx_gid != move.gid || (status.stx_mode & 0500) != 0500)
        return refuse(EXDEV);
    move.mount = status.stx_mnt_id;
    if (check_target(fds[1], message->second) < 0)
        return -1;
    snprintf(place, sizeof place, DEPUTY_MOVE_PLACE, (unsigned long long)message->request.resolve);
    if (mkdirat(fds[1], place, 0700) < 0)
        return errno == EEXIST ? refuse(EXDEV) : -1;
    move.place = open_below(fds[1], place);
    int done = move.place < 0 || check_place(&move) < 0 ? -1 : make_and_name(&move, source, message, fds);
    int error = errno;
    if (move.place >= 0) {
        unlinkat(move.place, TREE, AT_REMOVEDIR); /* where there was no move */
        close(move.place);
    }
    if (unlinkat(fds[1], place, AT_REMOVEDIR) < 0 && errno != ENOENT)
        result->value = DEPUTY_PLACE_IS_OTHERS;
    free(move.linked.places);
    errno = error;
    return done;
}

int deputy_move(const struct deputy_message *message, const int *fds, struct deputy_result *result)
{
    umask(0); /* rename(2) knows none; each mode here is given */
    int source = open_below(fds[0], message->path);
    int done = source < 0 ? -1 : move_to(message, fds, source, result);
    int error = errno;
    if (source >= 0)
        close(source);
    /* What a rename(2) can end with on any disk, and what is to be said of this one; all else is that it cannot be done. */
    static const int told[] = {ENOSPC, EDQUOT, ENOMEM, EIO, EINTR, ENOTEMPTY, ENOTDIR, EEXIST, EBUSY, ENOENT};
    errno = EXDEV;
    for (size_t i = 0; i < sizeof told / sizeof told[0]; i++)
        if (error == told[i])
            errno = error;
    return done;
}
