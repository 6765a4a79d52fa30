#include "locks.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "kernel.h"
#include "wire.h"

int set_rlimit(const struct step *step)
{
    int resource = (int)step->number[0];
    struct rlimit now;
    if (getrlimit(resource, &now) < 0)
        return -1;
    rlim_t wanted = (rlim_t)step->number[1];
    if (now.rlim_max == RLIM_INFINITY || wanted < now.rlim_max)
        now.rlim_max = wanted;
    now.rlim_cur = now.rlim_max;
    return setrlimit(resource, &now);
}

/* The deputy gets the same rules, made here, where no path leads elsewhere yet. Scopes are about other domains, and its own
 * is another: it would reach nobody's abstract sockets, so it has to look after itself (check_network in deputy_calls.c). */
int add_landlock(struct building *building, const struct step *step, const char **detail)
{
    struct landlock_ruleset ruleset = {step->number[0], step->number[1], step->number[2]};
    struct landlock_ruleset unscoped = {step->number[0], step->number[1], 0};
    if (building->domain >= 0) {
        errno = EEXIST; /* the deputy takes one only */
        return -1;
    }
    int fd = (int)syscall(SYS_landlock_create_ruleset, &ruleset, sizeof ruleset, 0);
    if (fd < 0)
        return -1;
    building->domain = (int)syscall(SYS_landlock_create_ruleset, &unscoped, sizeof unscoped, 0);
    if (building->domain < 0)
        return -1;
    struct cursor items = step_items(step);
    for (uint32_t i = 0; i < step->count; i++) {
        struct landlock_path_beneath_attr rule = {.allowed_access = take_u64(&items)};
        *detail = take_string(&items);
        rule.parent_fd = open(*detail, O_PATH | O_CLOEXEC);
        if (rule.parent_fd < 0)
            return -1;
        if (syscall(SYS_landlock_add_rule, fd, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0 ||
            syscall(SYS_landlock_add_rule, building->domain, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0)
            return -1;
        close(rule.parent_fd);
    }
    *detail = "restrict";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || syscall(SYS_landlock_restrict_self, fd, 0) < 0)
        return -1;
    return close(fd);
}

int set_affinity(const struct step *step)
{
    cpu_set_t processors;
    CPU_ZERO(&processors);
    struct cursor items = step_items(step);
    for (uint32_t i = 0; i < step->count; i++)
        CPU_SET(take_u32(&items), &processors);
    return sched_setaffinity(0, sizeof processors, &processors);
}

int install_filter(const struct step *filter, const char **detail)
{
    /* WAIT_KILLABLE_RECV: a call that somebody decides about is not interrupted by signals, so it is decided once. */
    const unsigned flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    struct sock_fprog program = {
        .len = (unsigned short)(filter->length / sizeof(struct sock_filter)),
        .filter = (struct sock_filter *)(uintptr_t)filter->bytes,
    };
    int listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (listener >= 0)
        return listener;

    int error = errno;
    *detail = "install";
    if (error == EBUSY) /* seccomp(2): one listener for a process and all that it comes from */
        *detail = "there is another listener already";
    /* Flags are looked at before the program, so without one a kernel that knows them says EFAULT. */
    if (error == EINVAL && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, NULL) < 0 && errno == EINVAL)
        *detail = "a listener with WAIT_KILLABLE_RECV needs Linux 5.19";
    errno = error;
    return -1;
}
