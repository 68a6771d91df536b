"""Whether a process that was sent SIGSTOP stands still, which on a busy machine takes a while."""

from pathlib import Path

__all__ = ["is_stopped"]


def is_stopped(pid: int) -> bool:
    """Whether no thread of the process runs; False if there is none."""
    try:
        stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False
    return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}
