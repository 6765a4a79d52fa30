"""Secrets that never enter a sandbox: how they are found, put into requests, and taken out of answers."""
