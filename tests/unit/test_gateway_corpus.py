"""The gateway's parsers on kept seeds, on what fuzzing has found, and on mutations of both: any bytes get an answer.

Inputs have at most 64 KiB, which bounds their time. tests/fuzz/fuzz_gateway.py says what must hold of each, and goes
on for longer (`make fuzz`).
"""

from __future__ import annotations

import random
from itertools import islice

import pytest

from tests.fuzz.fuzz_gateway import CHECKS, CORPUS, MAX_INPUT, mutations, seeds
from tests.fuzz.make_gateway_corpus import SEEDS

MUTATIONS = 2000
KEPT = [(parser, name) for parser in CHECKS for name in seeds(parser)]


@pytest.mark.parametrize(("parser", "name"), KEPT)
def test_a_kept_input_is_answered(parser: str, name: str) -> None:
    data = seeds(parser)[name]
    assert len(data) <= MAX_INPUT
    CHECKS[parser](data, random.Random(0))


@pytest.mark.parametrize("parser", CHECKS)
def test_mutations_are_answered(parser: str) -> None:
    chance = random.Random(parser)
    for number, data in enumerate(islice(mutations(list(seeds(parser).values()), chance), MUTATIONS)):
        try:
            CHECKS[parser](data, random.Random(number))
        except Exception as error:
            raise AssertionError(f"mutation {number}: {data[:4096]!r}") from error


def test_the_seeds_are_those_of_their_generator() -> None:
    for parser, made in SEEDS.items():
        kept = seeds(parser)
        assert made.items() <= kept.items()
        assert all(name in made or name.startswith("found-") for name in kept)
    assert sum(len(seeds(parser)) for parser in SEEDS) > 0 and set(SEEDS) == set(CHECKS)
    assert {path.name for path in CORPUS.iterdir()} >= set(CHECKS)
