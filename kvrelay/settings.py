"""What can be set, and to what by default: frozen groups of settings. `kvrelay.config` reads them."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AUTO",
    "DEMO_MODEL",
    "ClusterSettings",
    "EngineSettings",
    "GatewaySettings",
    "Settings",
    "TransferSettings",
    "WorkerSettings",
]

DEMO_MODEL = "demo"
AUTO = "auto"


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    unit: str = "",
    bare: str | None = None,
) -> Any:
    """A dataclass field with what its flag, its check and its documentation need. Unit "bytes" takes 512MiB too.

    Args:
        bare: what the flag means without a value, if it can be without.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "unit": unit, "bare": bare}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What all processes of one cluster share."""

    redis: str = setting("", "Redis URL; empty starts a private server")
    run_dir: str = setting("", "folder for sockets, logs and the cluster's key; empty makes a temporary one")
    key_file: str = setting("", "file with the cluster's key, made when missing; empty puts it into the run directory")
    host: str = setting("127.0.0.1", "address to listen on")
    advertise_host: str = setting(
        "", "name under which others reach this process; empty means the host, or for 0.0.0.0 the machine's name"
    )
    insecure_bind: bool = setting(False, "listen on other addresses than loopback although nothing authenticates")
    detection_seconds: float = setting(
        2.0, "a worker that is silent for so long is taken for lost, and its requests go on elsewhere", minimum=0.5
    )
    log_level: str = setting("info", "least severity that is logged", choices=("debug", "info", "warning", "error"))
    prefill: int = setting(1, "number of prefill workers that `up` starts", minimum=1)
    decode: int = setting(1, "number of decode workers that `up` starts", minimum=1)

    @property
    def heartbeat_seconds(self) -> float:
        """Between two signs of life, and between two looks for those of others."""
        return self.detection_seconds / 8

    @property
    def heartbeat_lease_seconds(self) -> float:
        """How long a sign of life counts; the look that finds it missing comes within `detection_seconds`."""
        return self.detection_seconds * 3 / 4

    def address(self, port: int) -> str:
        """Where others reach this process."""
        everywhere = self.host in ("0.0.0.0", "::")
        host = self.advertise_host or (socket.gethostname() if everywhere else self.host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The gateway's limits."""

    port: int = setting(50051, "port of the public API", minimum=0, maximum=65535)
    max_running: int = setting(256, "requests on the workers at once; the others queue", minimum=1)
    max_waiting: int = setting(1024, "requests that may queue; more are refused", minimum=0)
    disaggregation: str = setting(
        "always",
        "who computes prompts: always the prefill workers, never they but the decode workers, or auto, what costs less",
        choices=("always", "never", "auto"),
    )
    worker_wait_seconds: float = setting(30.0, "how long a request waits for a worker when there is none", minimum=0)
    max_failures: int = setting(
        4, "so many workers may fail a request, which goes on elsewhere each time; the next failure ends it", minimum=0
    )
    responses_per_second: float = setting(
        0.0,
        "responses sent over all streams before tokens travel together; 0 means 160 for each CPU core, inf no limit",
        minimum=0,
    )
    replay_seconds: float = setting(60.0, "how long a finished request can be replayed", minimum=0)
    replay_requests: int = setting(1024, "how many finished requests can be replayed", minimum=0)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Who a worker process is."""

    worker_id: str = setting("", "unique name; empty makes one from role, host name and process id")
    worker_port: int = setting(0, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    advertise_port: int = setting(
        0, "port under which others reach this worker; 0 means the one it listens on", minimum=0, maximum=65535
    )
    stuck_seconds: float = setting(
        20.0, "a worker whose engine takes longer for one step is not ready; 0 allows any time", minimum=0
    )
    drain_seconds: float = setting(30.0, "how long running requests may take to finish after SIGTERM", minimum=0)

    def id_of(self, service: str) -> str:
        """The name of this process, which is a gateway, a prefill or a decode worker."""
        return self.worker_id or f"{service}-{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The model and the batching loop."""

    model: str = setting(DEMO_MODEL, "checkpoint folder, Hugging Face hub name, or demo for the model shipped")
    served_model_name: str = setting("", "name of the model in the API; empty: the folder's own, else as in --model")
    device: str = setting("auto", "torch device; auto takes a GPU if there is one, and workers of one host take turns")
    local_rank: int = setting(0, "which of the workers of this host it is, from 0", minimum=0)
    local_size: int = setting(1, "workers of this host; those that share a GPU share its memory", minimum=1)
    dtype: str = setting(
        "auto",
        "auto means float32 on a CPU, else the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "none",
        "int8 keeps the weights in 8 bits, which is faster and loses a little; on a CPU only",
        choices=("none", "int8"),
    )
    block_size: int = setting(16, "tokens in a KV block", minimum=1, maximum=1024)
    num_blocks: int = setting(0, "KV blocks in the pool; 0 derives them from kv_cache_memory", minimum=0)
    kv_cache_memory: int = setting(
        0, "size of the KV pool; 0 means 512MiB on a CPU, most of its share of a GPU", minimum=0, unit="bytes"
    )
    shared_pool: str = setting(
        "",
        "file of a KV pool for all workers of this host, between which no blocks move; `up` makes one if none is named",
        bare=AUTO,
    )
    context_length: int = setting(0, "tokens a request may have; 0 means as many as model and pool allow", minimum=0)
    max_num_sequences: int = setting(64, "sequences in the running batch", minimum=1)
    max_batched_tokens: int = setting(512, "tokens computed in one step; longer prompts are chunked", minimum=1)
    itl_limit: float = setting(
        0.1,
        "seconds that a decode step may take because prompt tokens ride beside it; 0 means no limit",
        minimum=0,
    )
    prefix_caching: bool = setting(True, "reuse KV blocks of equal prefixes")
    overlap: str = setting(
        "auto",
        "plan the next step while the device computes this one; auto does so on a GPU",
        choices=("auto", "always", "never"),
    )
    cuda_graphs: bool = setting(True, "replay decode steps as CUDA graphs on a GPU")
    threads: int = setting(
        0, "CPU threads of one worker; 0 means torch's default, and under `up` twice its share of the cores", minimum=0
    )


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """The handover of KV blocks."""

    transport: str = setting(
        "auto",
        "how blocks travel; auto takes the fastest that both ends share",
        choices=("auto", "pool", "shm", "nixl", "cuda_ipc", "grpc"),
    )
    require_transport: str = setting("", "transports that auto may choose, comma-separated; empty allows all")
    checksum: str = setting(
        "full",
        "which blocks that were moved are verified by an XXH3 checksum: all, one in eight, or none",
        choices=("full", "sampled", "off"),
    )
    lease_seconds: float = setting(30.0, "how long a worker that drains holds blocks that nobody fetches", minimum=0.1)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a process."""

    cluster: ClusterSettings = ClusterSettings()
    gateway: GatewaySettings = GatewaySettings()
    worker: WorkerSettings = WorkerSettings()
    engine: EngineSettings = EngineSettings()
    transfer: TransferSettings = TransferSettings()
