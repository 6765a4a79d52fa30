"""The system-call enforcer: which calls a sandbox may make, and what is done with those that have to be decided."""
