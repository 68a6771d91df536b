"""The nouns of the registry: who is there, how loaded, and the signed lease that says so.

A lease is one text in Redis, `MAC.JSON`, written anew at each heartbeat. Redis is not trusted with it: the MAC is
HMAC-SHA256 (RFC 2104) under the cluster's key over the JSON, which names the member and counts the beats, so nobody
without the key can forge, rename or replay a member.
"""

import dataclasses
import hashlib
import hmac
import json
import math
import re
from dataclasses import dataclass

from kvrelay.control.strict_json import from_json
from kvrelay.request import WorkerRole, WorkerState

__all__ = [
    "GatewayRecord",
    "Lease",
    "LinkRecord",
    "ModelInfo",
    "RejectedLease",
    "ShmOffer",
    "WorkerLoad",
    "WorkerRecord",
    "open_lease",
    "seal_lease",
]

_MAC_PURPOSE = b"kvrelay lease v1"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that a worker serves.

    Attributes:
        context_length: tokens that prompt and completion may have together.
        block_size: tokens in a KV block.
        model_digest: hex digest of the checkpoint.
        block_bytes: bytes of a KV block; 0 if unknown.
    """

    id: str
    architecture: str
    context_length: int
    vocab_size: int
    block_size: int
    model_digest: str
    block_bytes: int = 0

    def __post_init__(self) -> None:
        _require_counts(self, "context_length", "vocab_size", "block_bytes")
        if self.block_size < 1:
            raise ValueError("block_size: not positive")
        _require_hex(self, "model_digest")


@dataclass(frozen=True, slots=True)
class ShmOffer:
    """Where a worker's KV pool can be mapped by processes of the same host.

    Attributes:
        host_id: equal for processes that share memory.
        fd: the pool's file descriptor in the process `pid`.
        size: bytes.
        nonce: hex; what the pool's header must show, which proves that it is this pool.
    """

    host_id: str
    pid: int
    fd: int
    size: int
    nonce: str

    def __post_init__(self) -> None:
        _require_counts(self, "pid", "fd", "size")
        _require_hex(self, "nonce")


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """Who a worker is; unchanged from its start to its end.

    Attributes:
        address: host:port of its gRPC server.
        epoch: given by `Registration.start`; a later start of the same worker id has a higher one.
        shm: None where the pool is not in shared memory.
        max_batched_tokens: that one step computes, which is a chunk of a longer prompt. An older worker does not tell
            this, nor its limit, and is taken to have the usual.
        itl_limit: seconds for which prompt tokens may hold up a step in which others decode; 0 is no limit.
    """

    worker_id: str
    role: WorkerRole
    address: str
    pid: int
    model: ModelInfo
    shm: ShmOffer | None = None
    epoch: int = 0
    max_batched_tokens: int = 512
    itl_limit: float = 0.1

    def __post_init__(self) -> None:
        _require_identity(self.worker_id, self.address)
        _require_counts(self, "pid", "epoch", "max_batched_tokens")
        if self.role is WorkerRole.UNSPECIFIED:
            raise ValueError("role: unspecified")
        if not self.itl_limit >= 0:
            raise ValueError("itl_limit: negative or not a number")

    @property
    def member(self) -> str:
        """The name under which the registry knows it."""
        return f"worker:{self.worker_id}"


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """Who a gateway is; the fields mean what those of WorkerRecord do."""

    gateway_id: str
    address: str
    pid: int
    epoch: int = 0

    def __post_init__(self) -> None:
        _require_identity(self.gateway_id, self.address)
        _require_counts(self, "pid", "epoch")

    @property
    def member(self) -> str:
        """The name under which the registry knows it."""
        return f"gateway:{self.gateway_id}"


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """How fast a prefill worker's blocks reach a decode worker.

    Attributes:
        bandwidth: bytes per second; 0 if unknown.
        latency: seconds of a round trip; 0 if unknown.
    """

    prefill_worker_id: str
    transport: str
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if not 0 <= self.bandwidth < math.inf or not 0 <= self.latency < math.inf:
            raise ValueError("bandwidth, latency: negative or not finite")


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How loaded a worker is.

    Attributes:
        waiting_tokens: prompt tokens that are queued or running and not computed yet.
        prefill_rate: prompt tokens computed per second, as measured; 0 while unknown.
        links: of a decode worker, one for each prefill worker that it is paired with.
    """

    state: WorkerState
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    waiting_tokens: int
    prefill_rate: float = 0.0
    links: tuple[LinkRecord, ...] = ()

    def __post_init__(self) -> None:
        _require_counts(self, "running", "waiting", "blocks_total", "blocks_free", "waiting_tokens", "prefill_rate")
        if not math.isfinite(self.prefill_rate):
            raise ValueError("prefill_rate: not finite")


@dataclass(frozen=True, slots=True)
class Lease:
    """What one heartbeat says.

    Attributes:
        beat: counts the heartbeats of one epoch.
        load: a worker's; None for a gateway.
        withdrawn: the member's farewell.
    """

    record: WorkerRecord | GatewayRecord
    beat: int
    load: WorkerLoad | None = None
    withdrawn: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Grows with each heartbeat of a member, also over its restarts."""
        return self.record.epoch, self.beat


class RejectedLease(ValueError):
    """A lease that is forged or malformed; the text says which."""


def seal_lease(lease: Lease, cluster_key: bytes) -> str:
    """The lease as it is kept in Redis."""
    body = json.dumps(dataclasses.asdict(lease), separators=(",", ":"))
    return f"{_mac(body, cluster_key)}.{body}"


def open_lease(member: str, text: str, cluster_key: bytes) -> Lease:
    """The lease that was found under a member's name.

    Raises:
        RejectedLease: it was not written by this member with this key, or says something malformed.
    """
    mac, _, body = text.partition(".")
    if not hmac.compare_digest(mac.encode("utf-8", "surrogateescape"), _mac(body, cluster_key).encode()):
        raise RejectedLease("not signed with the cluster's key")
    try:
        lease = _decode(member, json.loads(body))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RejectedLease(f"malformed: {error}") from error
    if lease.record.member != member:
        raise RejectedLease("names another member")
    return lease


def _decode(member: str, body: dict[str, object]) -> Lease:
    kind = member.partition(":")[0]
    beat, withdrawn = from_json(int, body["beat"]), from_json(bool, body["withdrawn"])
    if kind == "worker":
        return Lease(from_json(WorkerRecord, body["record"]), beat, from_json(WorkerLoad, body["load"]), withdrawn)
    if kind == "gateway":
        return Lease(from_json(GatewayRecord, body["record"]), beat, None, withdrawn)
    raise ValueError("neither a worker nor a gateway")


def _mac(body: str, cluster_key: bytes) -> str:
    # The purpose comes first because the same key signs tickets: neither must ever pass for the other.
    message = _MAC_PURPOSE + b"\0" + body.encode("utf-8", "surrogateescape")
    return hmac.new(cluster_key, message, hashlib.sha256).hexdigest()


def _require_counts(value: object, *names: str) -> None:
    for name in names:
        if getattr(value, name) < 0:
            raise ValueError(f"{name}: negative")


def _require_hex(value: object, *names: str) -> None:
    for name in names:
        if not re.fullmatch(r"([0-9a-f]{2})+", getattr(value, name)):
            raise ValueError(f"{name}: not a hexadecimal string")


def _require_identity(member_id: str, address: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]-]{1,256}", member_id):
        raise ValueError("id: empty, too long or with characters outside A-Z a-z 0-9 . _ : [ ] -")
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("address: not host:port")
