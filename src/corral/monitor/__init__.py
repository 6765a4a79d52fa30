"""The one decider. ``core`` combines what the parts say; ``parts`` are the slots; ``records`` is what is told of it."""
