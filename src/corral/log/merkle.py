"""Merkle tree hashes and proofs over SHA-256 (RFC 6962, section 2.1).

Nothing here knows where hashes are kept: whoever computes a proof gives a function that returns the hash of a complete
subtree, and whoever verifies one has nothing but the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

HASH_SIZE = 32
"""Bytes of a hash."""
EMPTY = sha256(b"").digest()
"""The root of the tree without leaves."""
MAX_PROOF = 63
"""Hashes of the longest proof that is read (tlog-witness)."""

Subtree = Callable[[int, int], bytes]
"""Of ``level`` and ``number``: the hash over the leaves from ``number << level`` on, ``1 << level`` of them."""


class ProofError(ValueError):
    """A proof does not prove what it is given for."""


def leaf_hash(entry: bytes) -> bytes:
    """MTH of one entry."""
    return sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """MTH of two subtrees."""
    return sha256(b"\1" + left + right).digest()


def perfect_root(hashes: Sequence[bytes]) -> bytes:
    """The hash over subtrees of equal size, a power of two of them and at least one."""
    level = hashes
    while len(level) > 1:
        pairs = iter(level)
        level = [sha256(b"\1" + left + right).digest() for left, right in zip(pairs, pairs, strict=True)]
    return level[0]


def complete_subtrees(start: int, end: int) -> list[tuple[int, int]]:
    """The fewest complete subtrees, as (level, number), that cover the leaves from ``start`` up to ``end`` in order."""
    found = []
    while start < end:
        level = (end - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        found.append((level, start >> level))
        start += 1 << level
    return found


def fold(hashes: Iterable[bytes]) -> bytes:
    """The root over complete subtrees that cover a tree in order, the largest first."""
    root = b""
    for each in reversed(list(hashes)):
        root = node_hash(each, root) if root else each
    return root or EMPTY


def root_hash(size: int, subtree: Subtree) -> bytes:
    """The root of the tree with ``size`` leaves."""
    return fold(subtree(level, number) for level, number in complete_subtrees(0, size))


# ---- proofs ----


def _split(size: int) -> int:
    """The largest power of two below ``size`` (k in the RFC)."""
    return 1 << ((size - 1).bit_length() - 1)


def _range_hash(start: int, end: int, subtree: Subtree) -> bytes:
    """MTH of the leaves from ``start`` up to ``end``. ``start`` is a multiple of a power of two that is not below their
    number, as it is for every subtree of the RFC."""
    return fold(subtree(level, number) for level, number in complete_subtrees(start, end))


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """PATH(index, D[size]) (section 2.1.1): from the sibling of the leaf up to the child of the root.

    Raises ValueError where the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    proof = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            proof.append(_range_hash(middle, end, subtree))
            end = middle
        else:
            proof.append(_range_hash(start, middle, subtree))
            start = middle
    proof.reverse()
    return proof


def check_inclusion(proof: Sequence[bytes], index: int, size: int, leaf: bytes, root: bytes) -> None:
    """Raises ProofError unless ``leaf`` is the hash of leaf ``index`` in the tree of that size and root.

    The algorithm is that of RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise ProofError(f"a tree of {size} leaves has no leaf {index}")
    number, last, computed = index, size - 1, leaf
    for sibling in _checked(proof):
        if last == 0:
            raise ProofError("the proof is too long")
        if number & 1 or number == last:
            computed = node_hash(sibling, computed)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            computed = node_hash(computed, sibling)
        number, last = number >> 1, last >> 1
    if last:
        raise ProofError("the proof is too short")
    if computed != root:
        raise ProofError(f"the proof does not lead from this entry at {index} to the root of {size}")


def consistency_proof(old: int, new: int, subtree: Subtree) -> list[bytes]:
    """PROOF(old, D[new]) (section 2.1.2). Empty for an empty old tree, and for equal sizes.

    Raises ValueError where ``old`` is not between 0 and ``new``.
    """
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {new} leaves has no earlier one of {old}")
    if old in (0, new):
        return []
    proof = []
    start, end, whole = 0, new, True
    while old - start != end - start:
        middle = start + _split(end - start)
        if old <= middle:
            proof.append(_range_hash(middle, end, subtree))
            end = middle
        else:
            proof.append(_range_hash(start, middle, subtree))
            start, whole = middle, False
    if not whole:
        proof.append(_range_hash(start, end, subtree))
    proof.reverse()
    return proof


def check_consistency(proof: Sequence[bytes], old: int, new: int, old_root: bytes, new_root: bytes) -> None:
    """Raises ProofError unless the tree of ``new`` leaves begins with that of ``old``.

    The algorithm is that of RFC 9162, section 2.1.4.2.
    """
    if not 0 <= old <= new:
        raise ProofError(f"a tree of {new} leaves has no earlier one of {old}")
    if old in (0, new):
        if proof:
            raise ProofError("the proof is too long")
        if old_root != (new_root if old else EMPTY) or (not new and new_root != EMPTY):
            raise ProofError(f"two roots of one size, {old}")
        return
    hashes = list(_checked(proof))
    if not hashes:
        raise ProofError("the proof is too short")
    if old & (old - 1) == 0:
        hashes.insert(0, old_root)
    number, last = old - 1, new - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    before = after = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise ProofError("the proof is too long")
        if number & 1 or number == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        number, last = number >> 1, last >> 1
    if last:
        raise ProofError("the proof is too short")
    if before != old_root:
        raise ProofError(f"the proof does not lead to the root of {old}")
    if after != new_root:
        raise ProofError(f"the tree of {new} does not continue that of {old}")


def _checked(proof: Sequence[bytes]) -> Sequence[bytes]:
    if len(proof) > MAX_PROOF or any(len(each) != HASH_SIZE for each in proof):
        raise ProofError("the proof is no list of hashes")
    return proof
