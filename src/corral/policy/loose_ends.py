"""What a policy says that nothing will come of, and what leads past its brokers: for whoever checks one. None of it is
a fault, all of it a surprise.

Globs are compared with globs by their text, which is right where one is the other with more in front of its ``*``; what
is not seen to be loose is not told. A deny of what is not there is as good as any.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from corral.actions import Content, Endpoint, Kind, Transport, Verdict
from corral.policy.matching import escape_glob, text_glob
from corral.policy.model import Api, ApiRule, Data, DataRule, Filesystem, Log, Model, ModelRule, Policy
from corral.policy.part import PolicyPart
from corral.policy.places import host_and_port
from corral.policy.secret_sources import secret_sources

MAX_ENDS = 50
"""Lines; the last one counts the rest."""


def loose_ends(policy: Policy) -> tuple[str, ...]:
    """One line each, in the order of the sections."""
    found = [*_of_models(policy.model), *_of_data(policy.data), *_of_services(policy.api), *_of_log(policy.log)]
    found += _past_brokers(policy)
    more = len(found) - MAX_ENDS
    return (*found[: MAX_ENDS - 1], f"and {more + 1} more like these") if more > 0 else tuple(found)


def _past_brokers(policy: Policy) -> Iterator[str]:
    """Where the sandbox can go itself although a broker goes there for it, and what it can read itself."""
    part = PolicyPart(policy)
    urls = [(f"model.upstreams[{index}]", each.url) for index, each in enumerate(policy.model.upstreams)]
    urls += [(f"data.sources[{index}]", each.url) for index, each in enumerate(policy.data.sources)]
    urls += [(f"api.services[{index}]", each.url) for index, each in enumerate(policy.api.services)]
    for place, url in urls:
        if url.startswith("/"):
            if _is_shown(policy.filesystem, url):
                yield f"{place}: {url} is shown inside by `filesystem`, past all that `tables` says"
        elif (endpoint := _endpoint(url)) and part.explain(Kind.NET_CONNECT, endpoint).opinion.verdict < Verdict.DENY:
            yield f"{place}: `network` lets the sandbox connect to {endpoint} itself, past the broker"
    for place, secret in secret_sources(policy):
        if secret.startswith("file:") and _is_shown(policy.filesystem, secret.removeprefix("file:")):
            yield f"{place}: the file of the secret is shown inside by `filesystem`"


def _is_shown(filesystem: Filesystem, path: str) -> bool:
    def covers(trees: tuple[str, ...]) -> bool:
        return any(path == tree or path.startswith(f"{tree}/") for tree in trees)

    return covers((*filesystem.read, *filesystem.write)) and not covers(filesystem.deny)


def _endpoint(url: str) -> Endpoint | None:
    """Where it leads; None for what is this machine to itself, which inside is the sandbox."""
    host, port = host_and_port(url)
    try:
        address = ip_address(host)
    except ValueError:
        return None if host == "localhost" else Endpoint(Transport.TCP, name=host, port=port)
    protected = address.is_private  # only a rule that names the address leads there
    return None if address.is_loopback else Endpoint(Transport.TCP, str(address), port, protected=protected)


def _is_literal(glob: str) -> bool:
    return escape_glob(glob) == glob


def _covers(globs: tuple[str, ...], other: str) -> bool:
    return any(text_glob(glob)(other) for glob in globs)


def _of_models(model: Model) -> Iterator[str]:
    rules: list[tuple[str, ModelRule]] = [(f"model.allow[{index}]", rule) for index, rule in enumerate(model.allow)]
    rules += [(f"model.ask[{index}]", rule) for index, rule in enumerate(model.ask)]
    if not model.upstreams:
        if rules:
            yield "model: models are allowed, but there are no `upstreams`: there is no model broker to ask"
        return
    if not rules:
        yield "model.upstreams: no rule of model.allow or model.ask lets any model be asked"
    served = tuple(glob for upstream in model.upstreams for glob in upstream.models)
    priced = tuple(price.model for price in model.prices)
    counted = model.session.money is not None or model.agent.money is not None
    for place, rule in rules:
        if _is_literal(rule.name) and not _covers(served, rule.name):
            yield f"{place}: no upstream has the model {rule.name}"
        elif counted and not _covers(priced, rule.name):
            yield f"{place}: there is a budget of money, and no price for all of {rule.name}: what has none is refused"


def _of_data(data: Data) -> Iterator[str]:
    rules: list[tuple[str, DataRule]] = [(f"data.allow[{index}]", rule) for index, rule in enumerate(data.allow)]
    rules += [(f"data.ask[{index}]", rule) for index, rule in enumerate(data.ask)]
    if not data.sources:
        if data.allow or data.ask:
            yield "data: queries are allowed, but there are no `sources`: there is no data broker to ask"
        return
    tables = {source.name: tuple(table.name for table in source.tables) for source in data.sources}
    for place, rule in rules:
        if rule.source not in tables:
            yield f"{place}: there is no source of the name {rule.source}"
            continue
        for glob in rule.tables:
            if not any(text_glob(glob)(table) for table in tables[rule.source]):
                yield f"{place}: {rule.source} has no table {glob}"
    named = {rule.source for rule in (*data.allow, *data.ask)}
    for index, source in enumerate(data.sources):
        if not source.tables:
            yield f"data.sources[{index}]: {source.name} has no tables, so nothing of it can be queried"
        elif source.name not in named:
            yield f"data.sources[{index}]: no rule of data.allow or data.ask lets {source.name} be queried"


def _of_services(api: Api) -> Iterator[str]:
    rules: list[tuple[str, ApiRule]] = [(f"api.allow[{index}]", rule) for index, rule in enumerate(api.allow)]
    rules += [(f"api.ask[{index}]", rule) for index, rule in enumerate(api.ask)]
    if not api.services:
        if api.allow or api.ask:
            yield "api: operations are allowed, but there are no `services`: there is no API broker to ask"
        return
    operations = {service.name: tuple(operation.id for operation in service.operations) for service in api.services}
    for place, rule in rules:
        if rule.service not in operations:
            yield f"{place}: there is no service of the name {rule.service}"
            continue
        for glob in rule.operations:
            if not any(text_glob(glob)(operation) for operation in operations[rule.service]):
                yield f"{place}: {rule.service} has no operation {glob}"
    named = {rule.service for rule in (*api.allow, *api.ask)}
    for index, service in enumerate(api.services):
        if not service.operations:
            yield f"api.services[{index}]: {service.name} has no operations, so nothing of it can be used"
        elif service.name not in named:
            yield f"api.services[{index}]: no rule of api.allow or api.ask lets {service.name} be used"


def _of_log(log: Log) -> Iterator[str]:
    keeps = Content.FILE in dict(log.keep)
    if log.files and not keeps:
        yield "log.files: files are named, but `log.keep` does not say how long a `file` is kept: none is"
    elif keeps and not log.files:
        yield "log.keep: a `file` is to be kept, but `log.files` names none"
