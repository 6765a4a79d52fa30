"""Who looks at the results of tools before a model does. See docs/brokers.md, "The guard"."""
