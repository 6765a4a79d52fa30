"""Applying: a kept layer's changes become those of the real workspace, all of them or none, and can be taken back.

    layer ──▶ proposal ──▶ risks       what would change, from what to what, and what a person must look at
                  │ consent: the hash of exactly that
                  ▼
    applying ──▶ carrying, marks       copies beside the workspace's files, then one atomic exchange for each
       └──▶ journal                    what is under way, so that a crash is taken back at the next start

Nothing is opened by a path of more than one component below the workspace, and nothing through a symbolic link.
"""
