"""Which variables of the caller commands inside have."""

from __future__ import annotations

from corral.policy.model import (
    Credential,
    CredentialKind,
    Data,
    Dialect,
    Environment,
    Model,
    ModelApi,
    Network,
    NetworkRule,
    Policy,
    Source,
    Upstream,
)
from corral.policy.secret_sources import secret_variables
from corral.sandbox.environment import make_environment


def test_secrets_pass_in_under_no_name_i8() -> None:
    caller = {"KEY": "s3cret-value", "KEY_AGAIN": "s3cret-value", "KEY_EMPTY": "", "KEY_OTHER": "x", "KEY_GONE": ""}
    made = make_environment(
        caller,
        Environment(allow=("KEY*",)),
        user=1000,
        path="/bin",
        hints={},
        secrets=("KEY", "KEY_GONE", "KEY_NOT_THERE"),
    )
    assert {name: value for name, value in made.items() if name.startswith("KEY")} == {
        "KEY_EMPTY": "",
        "KEY_OTHER": "x",
    }


def test_variables_of_all_secrets_are_known_i8() -> None:
    def credential(name: str) -> Credential:
        return Credential(CredentialKind.BEARER, name)

    policy = Policy(
        model=Model(upstreams=(Upstream("a", "https://a.test", ModelApi.OPENAI, credential=credential("env:A")),)),
        data=Data(sources=(Source("b", Dialect.POSTGRESQL, "postgresql://b@b.test:5432/b", password="env:B"),)),
        network=Network(
            allow=(NetworkRule(name="c.test", credential=credential("env:C")),),
            ask=(NetworkRule(name="d.test", credential=credential("file:/d")),),
        ),
    )
    assert secret_variables(policy) == {"A", "B", "C"}
