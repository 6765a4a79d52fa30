/* The sandbox's first process, once the walls stand: reaps, starts commands, passes signals on. It holds no policy and
 * keeps no state but the table of running execs. When the control socket ends it leaves, and the kernel takes every
 * process of the PID namespace with it. */
#ifndef CORRAL_INIT_H
#define CORRAL_INIT_H

#define PROCESSES_FD 4
#define KEEPER_FD 5 /* only until serve() */

/* Never returns. `processes_fd` lists every process of the PID namespace (see building.processes). */
_Noreturn void serve(int control, int processes_fd);

#endif
