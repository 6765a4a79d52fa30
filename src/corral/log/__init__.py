"""The log: what happened, in an order that cannot be changed afterwards, for outsiders to verify. See docs/log.md."""
