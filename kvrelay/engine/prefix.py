"""Names of KV blocks by content, under which equal prefixes share them.

A block's name is SHA-256 over its parent's name and its own tokens, so it stands for the whole prefix up to its end;
the chain begins with the model and the salt. Names are never shortened: a collision would show one request the KV
cache of another.
"""

import hashlib
from array import array
from collections.abc import Sequence

__all__ = ["block_digests", "root_digest"]


def root_digest(model_digest: bytes, cache_salt: str) -> bytes:
    """Where the chain of one model and one salt begins."""
    salt = cache_salt.encode()
    return hashlib.sha256(b"kvrelay prefix" + len(salt).to_bytes(4, "big") + salt + model_digest).digest()


def block_digests(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The names of the full blocks of `token_ids`, following `root`, which may itself be a block's name."""
    digests = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = array("I", token_ids[start : start + block_size]).tobytes()
        parent = hashlib.sha256(parent + tokens).digest()
        digests.append(parent)
    return digests
