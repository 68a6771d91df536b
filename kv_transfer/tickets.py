"""Tickets: what lets a decode worker pull the KV cache of one request, authenticated with the cluster's key."""

import hashlib
import hmac
import time
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvrelay.errors import FailedPrecondition, PermissionDenied
from kvrelay.v1 import kv_pb2

__all__ = ["Ticket", "open_ticket", "sign_ticket"]

# So that the same key may authenticate other things without one being taken for the other.
_PURPOSE = b"kvrelay ticket v1\0"
# Bounds what a ticket that leaks is worth. Far longer than a request waits for a decode worker, and than clocks differ.
TICKET_SECONDS = 3600.0
_MAC_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to pull `block_ids` from one start of one worker, for as long as that one holds them for the request.

    Names blocks, never addresses.

    Attributes:
        epoch: which start of the worker; another start knows nothing of these blocks.
        block_ids: in the order of the prompt; none twice.
        generations: how often each block had been allocated when the ticket was made.
    """

    request_id: str
    worker_id: str
    epoch: int
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]


def sign_ticket(ticket: Ticket, key: bytes) -> bytes:
    """The ticket as a serialized `kvrelay.v1.SignedTicket`, opaque to whoever carries it; it expires in an hour."""
    body = kv_pb2.KvTicket(
        request_id=ticket.request_id,
        worker_id=ticket.worker_id,
        epoch=ticket.epoch,
        block_ids=ticket.block_ids,
        generations=ticket.generations,
        expires_unix_ms=int((time.time() + TICKET_SECONDS) * 1000),
    ).SerializeToString()
    return kv_pb2.SignedTicket(ticket=body, mac=_mac(body, key)).SerializeToString()


def open_ticket(data: bytes, key: bytes) -> Ticket:
    """The ticket in `data`, if the cluster made it.

    Raises:
        PermissionDenied: malformed or forged; reason TICKET_REFUSED.
        FailedPrecondition: too old; reason TICKET_EXPIRED.
    """
    try:
        signed = kv_pb2.SignedTicket.FromString(data)
        if len(signed.mac) != _MAC_BYTES or not hmac.compare_digest(signed.mac, _mac(signed.ticket, key)):
            raise _refused()
        body = kv_pb2.KvTicket.FromString(signed.ticket)
    except DecodeError:
        raise _refused() from None
    num_blocks = len(body.block_ids)
    if num_blocks == 0 or num_blocks != len(body.generations) or num_blocks != len(set(body.block_ids)):
        raise _refused()
    if time.time() * 1000 >= body.expires_unix_ms:
        raise FailedPrecondition("the KV ticket has expired", reason="TICKET_EXPIRED")
    return Ticket(
        request_id=body.request_id,
        worker_id=body.worker_id,
        epoch=body.epoch,
        block_ids=tuple(body.block_ids),
        generations=tuple(body.generations),
    )


def _mac(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE + body, "sha256")


def _refused() -> PermissionDenied:
    # One answer for all, so that it teaches a forger nothing.
    return PermissionDenied("the KV ticket was not made by this cluster", reason="TICKET_REFUSED")
