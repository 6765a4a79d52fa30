"""Where the secrets are that a policy names: outside, in variables and files of whoever controls the sandbox."""

from __future__ import annotations

from collections.abc import Iterator

from corral.policy.model import Policy


def secret_sources(policy: Policy) -> Iterator[tuple[str, str]]:
    """Each with the place in the policy that names it, as ``env:NAME`` or ``file:/path``."""
    for index, upstream in enumerate(policy.model.upstreams):
        if upstream.credential is not None:
            yield f"model.upstreams[{index}]", upstream.credential.source
    for index, source in enumerate(policy.data.sources):
        yield f"data.sources[{index}]", source.password
    for index, service in enumerate(policy.api.services):
        if service.credential is not None:
            yield f"api.services[{index}]", service.credential.source
    network = policy.network
    for field, rules in (("allow", network.allow), ("ask", network.ask)):
        for index, rule in enumerate(rules):
            if rule.credential is not None:
                yield f"network.{field}[{index}]", rule.credential.source


def secret_variables(policy: Policy) -> frozenset[str]:
    """Names of the variables that hold one."""
    sources = (source for _, source in secret_sources(policy))
    return frozenset(source.removeprefix("env:") for source in sources if source.startswith("env:"))
