"""The egress gateway: one way out, and it has a name. :mod:`corral.gateway.service` is where to begin."""
