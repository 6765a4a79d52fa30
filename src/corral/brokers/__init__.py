"""Brokers: typed doors instead of raw network. See docs/brokers.md."""
