"""`kvrelay restart`: the workers of a cluster on this machine begin anew, one after the other or all at once."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvrelay.client import Client
from kvrelay.errors import FailedPrecondition, KvrelayError, Unavailable
from kvrelay.request import WorkerRole, WorkerState, WorkerStatus

__all__ = ["restart_workers"]

LOOK_SECONDS = 0.2

Report = Callable[[str], None]


def restart_workers(client: Client, *, rolling: bool, patience: float, report: Report) -> None:
    """Asks the workers to drain, and waits for their next starts, which is the supervisor's part.

    Rolling, a worker is asked when the one before is ready again, so that its requests can go on elsewhere: running
    sequences are handed over where another decode worker is, and everything else goes on when a worker is there.

    Args:
        patience: seconds for one worker to drain and to be ready again.
        report: takes a line for the user.

    Raises:
        FailedPrecondition: a worker is no process of this machine; nothing is restarted then.
        Unavailable: a worker does not come back in time.
    """
    workers = [worker for worker in client.status().workers if worker.role is not WorkerRole.UNSPECIFIED]
    for worker in workers:
        _check_is_local(worker)
    for group in [[worker] for worker in workers] if rolling else [workers]:
        for worker in group:
            report(f"{worker.id} drains")
            os.kill(worker.pid, signal.SIGTERM)
        _wait_for_next_starts(client, group, patience)
        for worker in group:
            report(f"{worker.id} is ready again")


def _check_is_local(worker: WorkerStatus) -> None:
    try:
        words = Path(f"/proc/{worker.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    if b"kvrelay" not in words or worker.role.value.encode() not in words:
        raise FailedPrecondition(
            f"worker {worker.id} is no process of this machine; restart it where it runs", reason="WORKER_NOT_LOCAL"
        )


def _wait_for_next_starts(client: Client, group: Sequence[WorkerStatus], patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        missing = [worker.id for worker in group if not _began_anew(client, worker)]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise Unavailable(f"{', '.join(missing)} did not come back within {patience:g} s", reason="WORKER_LOST")
        time.sleep(LOOK_SECONDS)


def _began_anew(client: Client, former: WorkerStatus) -> bool:
    try:
        workers = client.status().workers
    except KvrelayError:
        return False
    return any(
        worker.id == former.id and worker.epoch > former.epoch and worker.state is WorkerState.READY
        for worker in workers
    )
