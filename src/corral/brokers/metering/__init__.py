"""What may be used of models, data and services, and what was. See docs/brokers.md, "Budgets and the meter"."""
