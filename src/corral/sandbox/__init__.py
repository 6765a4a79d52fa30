"""The sandbox: walls that hold, and the verbs of what goes on inside.

From options to an end, in the order in which a sandbox meets them: ``options`` (checked) → ``prepare`` (``identity``,
``view``, ``limits``, ``cgroups``, ``landlock``, ``environment`` → ``plan``) → ``launcher`` → ``core`` (over
``channel``) → ``box`` and ``sync`` (the faces) → ``layer`` (what is left).
"""
