/* Renaming a directory that an overlay has from below, which the kernel refuses (EXDEV) as ours have no redirects.
 *
 * The tree is made anew beside its new name, with hard links to its files: the overlay copies each of them up, with all
 * that belongs to it, and nothing is copied here. Then it gets its new name by one rename(2), and only then the old tree
 * is taken away. So until that rename the old tree is whole and what is left over has another name; from then on the new
 * one is whole. All of it is done with the caller's rights, by descriptors of the directories, and no link is followed. */
#ifndef CORRAL_DEPUTY_MOVE_H
#define CORRAL_DEPUTY_MOVE_H

#include "deputy.h"

/* What is done as long as it is, lies in a directory of this name beside the new name. */
#define DEPUTY_MOVE_PLACE ".corral-move-%016llx"

#define DEPUTY_MAX_MOVED 131072 /* entries of a tree; larger ones are EXDEV, as without all this */
#define DEPUTY_MAX_DEPTH 120    /* of directories: each is two descriptors, of DEPUTY_MAX_FDS and some */

/* Whether EXDEV of this rename may be an overlay's, about its own tree. */
bool deputy_may_move(const struct deputy_message *message, const int *fds);

/* From here on SIGTERM ends a move early, with EINTR, as long as it has not its new name. */
int deputy_heed_end(void);

/* Makes the move. 0, or -1 with errno: EXDEV where it cannot be made with these rights or not whole, and ENOSPC where
 * there is no room for it; nothing is changed then. `value` of the result is DEPUTY_PLACE_IS_OTHERS where the place stays,
 * as there is something in it that others have put there, or into the old tree. */
int deputy_move(const struct deputy_message *message, const int *fds, struct deputy_result *result);

#endif
