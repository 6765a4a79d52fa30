"""Tree hashes and proofs are those of RFC 6962, and a proof of anything else is refused."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.log.merkle import (
    EMPTY,
    ProofError,
    Subtree,
    check_consistency,
    check_inclusion,
    complete_subtrees,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    perfect_root,
    root_hash,
)

LEAVES = [leaf_hash(str(number).encode()) for number in range(80)]


def reference(leaves: list[bytes]) -> bytes:
    """MTH as section 2.1 defines it."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\1" + reference(leaves[:split]) + reference(leaves[split:])).digest()


def subtrees(leaves: list[bytes]) -> Subtree:
    return lambda level, number: reference(leaves[number << level : (number + 1) << level])


def test_known_roots() -> None:
    """Of the test vectors that certificate transparency logs share (certificate-transparency-go, merkle)."""
    entries = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    leaves = [leaf_hash(bytes.fromhex(entry)) for entry in entries]
    for size, root in enumerate(roots, 1):
        assert root_hash(size, subtrees(leaves[:size])).hex() == root
    assert root_hash(0, subtrees([])) == EMPTY


@given(st.integers(0, len(LEAVES)))
def test_the_root_is_that_of_the_definition_however_it_is_computed(size: int) -> None:
    leaves = LEAVES[:size]
    assert root_hash(size, subtrees(leaves)) == reference(leaves)
    if size.bit_count() == 1:
        assert perfect_root(leaves) == reference(leaves)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_complete_subtrees_cover_a_range_once_and_in_order(one: int, other: int) -> None:
    start, end = sorted((one, other))
    at = start
    for level, number in complete_subtrees(start, end):
        assert number << level == at
        at += 1 << level
    assert at == end


@given(st.data())
def test_a_proof_of_inclusion_proves_its_leaf_and_nothing_else(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(LEAVES)))
    index = data.draw(st.integers(0, size - 1))
    root = reference(LEAVES[:size])
    proof = inclusion_proof(index, size, subtrees(LEAVES[:size]))
    check_inclusion(proof, index, size, LEAVES[index], root)
    with pytest.raises(ProofError):
        check_inclusion(proof, index, size, leaf_hash(b"another"), root)
    with pytest.raises(ProofError):
        check_inclusion([*proof, LEAVES[0]], index, size, LEAVES[index], root)
    with pytest.raises(ProofError):
        check_inclusion(proof, index, size, LEAVES[index], leaf_hash(b"another"))
    for at in range(len(proof)):
        with pytest.raises(ProofError):
            check_inclusion([*proof[:at], *proof[at + 1 :]], index, size, LEAVES[index], root)
        with pytest.raises(ProofError):
            check_inclusion([*proof[:at], EMPTY, *proof[at + 1 :]], index, size, LEAVES[index], root)
    other = data.draw(st.integers(0, size - 1).filter(lambda number: number != index) if size > 1 else st.just(size))
    with pytest.raises(ProofError):
        check_inclusion(proof, other, size, LEAVES[index], root)


@given(st.data())
def test_a_proof_of_consistency_proves_its_two_trees_and_nothing_else(data: st.DataObject) -> None:
    new = data.draw(st.integers(0, len(LEAVES)))
    old = data.draw(st.integers(0, new))
    before, after = reference(LEAVES[:old]), reference(LEAVES[:new])
    proof = consistency_proof(old, new, subtrees(LEAVES[:new]))
    check_consistency(proof, old, new, before, after)
    with pytest.raises(ProofError):
        check_consistency([*proof, LEAVES[0]], old, new, before, after)
    with pytest.raises(ProofError):
        check_consistency(proof, old, new, leaf_hash(b"another"), after)
    if old:
        with pytest.raises(ProofError):
            check_consistency(proof, old, new, before, leaf_hash(b"another"))
    for at in range(len(proof)):
        with pytest.raises(ProofError):
            check_consistency([*proof[:at], *proof[at + 1 :]], old, new, before, after)
        with pytest.raises(ProofError):
            check_consistency([*proof[:at], EMPTY, *proof[at + 1 :]], old, new, before, after)


@given(st.lists(st.binary(max_size=40), max_size=70), st.integers(-1, 100), st.integers(-1, 100))
def test_any_proof_is_judged_or_refused(proof: list[bytes], one: int, other: int) -> None:
    with pytest.raises(ProofError):
        check_inclusion(proof, one, other, EMPTY, b"no root")
    with pytest.raises(ProofError):
        check_consistency(proof, one, other, b"no root", EMPTY)


def test_what_cannot_be_proven_is_refused() -> None:
    for index, size in ((0, 0), (3, 3), (-1, 3)):
        with pytest.raises(ValueError, match="no leaf"):
            inclusion_proof(index, size, subtrees(LEAVES))
    for old, new in ((4, 3), (-1, 3)):
        with pytest.raises(ValueError, match="no earlier one"):
            consistency_proof(old, new, subtrees(LEAVES))


def test_a_leaf_is_no_node() -> None:
    """Second preimages: what a node hashes is not accepted as an entry (section 2.1)."""
    left, right = LEAVES[:2]
    assert leaf_hash(left + right) != node_hash(left, right)
