#include <string.h>
#include <sys/socket.h>

#include "deputy.h"

struct shape {
    unsigned least, most; /* descriptors */
    bool name;            /* path is a single name */
    bool any_path;        /* path is a path */
    bool second;
    bool address;
    bool data;
};

static const struct shape shapes[] = {
    [DEPUTY_RESOLVE] = {.least = 0, .most = 1, .any_path = true},
    [DEPUTY_OPEN] = {.least = 1, .most = 1},
    [DEPUTY_CREATE] = {.least = 1, .most = 1, .name = true},
    [DEPUTY_RENAME] = {.least = 2, .most = 2, .name = true, .second = true},
    [DEPUTY_LINK] = {.least = 2, .most = 2, .name = true},
    [DEPUTY_SYMLINK] = {.least = 1, .most = 1, .name = true, .second = true},
    [DEPUTY_UNLINK] = {.least = 1, .most = 1, .name = true},
    [DEPUTY_CHMOD] = {.least = 1, .most = 1},
    [DEPUTY_CONNECT] = {.least = 1, .most = 2, .address = true},
    [DEPUTY_BIND] = {.least = 1, .most = 3, .name = true, .address = true},
    [DEPUTY_SEND] = {.least = 1, .most = DEPUTY_MAX_FDS, .address = true, .data = true},
    [DEPUTY_CANCEL] = {.least = 0, .most = 0},
    [DEPUTY_LISTEN] = {.least = 1, .most = 1},
    [DEPUTY_MAKE] = {.least = 1, .most = 1, .name = true},
};

static bool single_name(const char *name)
{
    return name[0] && strcmp(name, ".") != 0 && strcmp(name, "..") != 0 && !strchr(name, '/');
}

/* Not a path: what is decided about a path must come as an object. */
static bool harmless_address(const struct deputy_message *message)
{
    uint32_t length = message->request.address_length;
    sa_family_t family;
    if (length < sizeof family)
        return false;
    memcpy(&family, message->address, sizeof family);
    if (family == AF_UNSPEC)
        return message->request.operation == DEPUTY_CONNECT;
    if (family != AF_UNIX)
        return false;
    if (length == sizeof family) /* unnamed: bind(2) then chooses an abstract address (unix(7), autobind) */
        return message->request.operation == DEPUTY_BIND;
    return message->address[sizeof family] == '\0';
}

/* A path that bind(2) will end at its NUL or at its length, so that none of it is hidden. */
static bool path_address(const struct deputy_message *message)
{
    sa_family_t family;
    uint32_t length = message->request.address_length;
    if (length <= sizeof family)
        return false;
    memcpy(&family, message->address, sizeof family);
    return family == AF_UNIX && message->address[sizeof family] != '\0';
}

/* A relative address is resolved from somewhere, but the name itself only in its directory. */
static bool resolved_from_start(const struct deputy_message *message)
{
    const char *path = (const char *)message->address + sizeof(sa_family_t);
    return message->request.address_length != 0 && path[0] != '/' && strcmp(path, message->path) != 0;
}

static const char *check_sockets(const struct deputy_message *message, unsigned count)
{
    const struct deputy_request *request = &message->request;
    switch (request->operation) {
    case DEPUTY_CONNECT:
        if (count == 2 ? request->address_length != 0 : !harmless_address(message))
            return "address";
        return NULL;
    case DEPUTY_BIND:
        if (count == 1)
            return request->path_length == 0 && harmless_address(message) ? NULL : "address";
        if (!single_name(message->path))
            return "name";
        if (request->address_length != 0 && !path_address(message))
            return "address";
        return (count == 3) == resolved_from_start(message) ? NULL : "start";
    case DEPUTY_SEND:
        if (count < 1u + !!(request->options & DEPUTY_TO_OBJECT) + !!(request->options & DEPUTY_APART))
            return "descriptors";
        if (request->options & DEPUTY_APART && request->data_length != 0)
            return "data";
        if (request->address_length == 0)
            return NULL;
        return request->options & DEPUTY_TO_OBJECT || !harmless_address(message) ? "address" : NULL;
    }
    return NULL;
}

static const char *take_text(const uint8_t **at, uint32_t length, char *into)
{
    if (memchr(*at, 0, length))
        return "NUL";
    memcpy(into, *at, length);
    into[length] = '\0';
    *at += length;
    return NULL;
}

const char *deputy_parse(struct deputy_message *message, const void *bytes, size_t length, unsigned count)
{
    struct deputy_request *request = &message->request;
    memset(request, 0, sizeof *request);
    memcpy(request, bytes, length < sizeof *request ? length : sizeof *request);
    if (length < sizeof *request)
        return "too short";
    if (request->operation < DEPUTY_RESOLVE || request->operation > DEPUTY_MAKE)
        return "operation";
    const struct shape *shape = &shapes[request->operation];
    if (request->path_length > DEPUTY_MAX_PATH || request->second_length > DEPUTY_MAX_PATH ||
        request->address_length > DEPUTY_MAX_ADDRESS || request->data_length > DEPUTY_MAX_DATA)
        return "too long";
    if (length - sizeof *request != (size_t)request->path_length + request->second_length + request->address_length +
                                        request->data_length)
        return "length";
    if (count < shape->least || count > shape->most)
        return "descriptors";
    if ((!shape->name && !shape->any_path && request->path_length) || (!shape->second && request->second_length) ||
        (!shape->address && request->address_length) || (!shape->data && request->data_length))
        return "not this operation's";
    if (request->options & ~(request->operation == DEPUTY_SEND ? DEPUTY_TO_OBJECT | DEPUTY_APART : 0u))
        return "options";
    if (request->mode & ~07777u || request->umask & ~0777u || request->reserved)
        return "mode";
    /* setresuid(2) takes -1 for "as before": whoever asked before. */
    if (request->uid == UINT32_MAX || request->gid == UINT32_MAX)
        return "ids";

    const uint8_t *at = (const uint8_t *)bytes + sizeof *request;
    if (take_text(&at, request->path_length, message->path) || take_text(&at, request->second_length, message->second))
        return "NUL";
    memcpy(message->address, at, request->address_length);
    message->address[request->address_length] = '\0';
    message->data = at + request->address_length;

    /* A relative path needs somewhere to start from, an empty one something that it is. */
    if (shape->any_path && message->path[0] != '/' && count == 0)
        return "start";
    if (shape->name && request->operation != DEPUTY_BIND && !single_name(message->path))
        return "name";
    if (request->operation == DEPUTY_RENAME && !single_name(message->second))
        return "name";
    return check_sockets(message, count);
}
