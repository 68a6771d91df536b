"""Which blocks of a ticket are verified by a checksum. Both ends choose alike, so nothing is sent about the choice."""

import hashlib
from collections.abc import Sequence

from kvrelay.errors import InvalidArgument
from kvrelay.v1 import kv_pb2

__all__ = ["CHECKSUM_MODES", "verified_positions"]

# The setting's words, and what a PullRequest says for them.
CHECKSUM_MODES = {
    "full": kv_pb2.CHECKSUM_MODE_FULL,
    "sampled": kv_pb2.CHECKSUM_MODE_SAMPLED,
    "off": kv_pb2.CHECKSUM_MODE_OFF,
}
_ONE_IN = 8


def verified_positions(mode: int, signed_ticket: bytes, first: int, count: int, total: int) -> Sequence[int]:
    """The positions among `count` from `first` on that are verified, of a ticket of `total` blocks.

    Args:
        mode: a `kvrelay.v1.ChecksumMode`.
        signed_ticket: with its MAC, so that no fault on the way can know which blocks are looked at.

    Raises:
        InvalidArgument: a mode that this version does not know.
    """
    positions = range(first, first + count)
    if mode in (kv_pb2.CHECKSUM_MODE_UNSPECIFIED, kv_pb2.CHECKSUM_MODE_FULL):
        return positions
    if mode == kv_pb2.CHECKSUM_MODE_OFF:
        return ()
    if mode == kv_pb2.CHECKSUM_MODE_SAMPLED:
        lots = hashlib.shake_256(signed_ticket).digest(total)
        return [position for position in positions if lots[position] % _ONE_IN == 0 or position == total - 1]
    raise InvalidArgument.field("checksum", f"{mode} is no mode that this version knows")
