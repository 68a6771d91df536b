"""Which transport a pair of workers uses: of those that both can do, the fastest that works."""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from kv_transfer.threads import run_to_end
from kv_transfer.transport import BlockReceiver, TransferFailed
from kvrelay.errors import ConfigurationError, FailedPrecondition, KvrelayError

__all__ = ["FASTEST_FIRST", "Choice", "Opener", "choose_transport", "parse_required"]

log = logging.getLogger(__name__)

FASTEST_FIRST = ("pool", "cuda_ipc", "shm", "nixl", "grpc")
Opener = Callable[[], Awaitable[BlockReceiver]]


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport that works.

    Attributes:
        bandwidth: bytes per second, as it was tried out.
        fallback: why each faster one that such a pool could use is not used; empty if there is none.
    """

    receiver: BlockReceiver
    bandwidth: float
    fallback: str


def parse_required(text: str) -> frozenset[str]:
    """The setting `require_transport`.

    Raises:
        ConfigurationError: a name is no transport's.
    """
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    for name in sorted(names - set(FASTEST_FIRST)):
        raise ConfigurationError(f"require_transport: {name!r} is no transport; valid are {', '.join(FASTEST_FIRST)}")
    return names


async def choose_transport(
    preference: str,
    required: Collection[str],
    openers: Mapping[str, Opener | str],
    offered: Collection[str],
    try_out: Callable[[BlockReceiver], Awaitable[float]],
) -> Choice:
    """The receiver for blocks of one prefill worker, tried out.

    Args:
        preference: "auto" or the name of a transport, which is then forced.
        required: the names that auto may choose; empty for any.
        openers: by name, for each transport that this worker's pool could use: how a receiver is made, or why this
            process cannot. Making one raises an error of `kvrelay.errors` if it does not work between these two.
        offered: the names of those that the prefill worker can do.
        try_out: measures a receiver's bandwidth.

    Raises:
        FailedPrecondition: the forced transport cannot work, or none that is required; reason TRANSPORT_REFUSED where
            no transport's own reason says it better.
        KvrelayError: what opening the forced transport raised.
    """

    async def open_one(name: str) -> tuple[BlockReceiver, float]:
        opener = openers.get(name, "this worker's KV pool is in another kind of memory")
        if isinstance(opener, str):
            raise _refused(opener)
        if name not in offered:
            raise _refused("the prefill worker does not offer it")
        return await _tried_out(await opener(), try_out)

    if preference != "auto":
        return Choice(*await open_one(preference), fallback="")
    failures: list[str] = []
    for name in sorted(openers, key=FASTEST_FIRST.index):
        if required and name not in required:
            failures.append(f"{name}: not listed in require_transport")
            continue
        try:
            receiver, bandwidth = await open_one(name)
        except KvrelayError as problem:
            failures.append(f"{name}: {problem.message}")
            if name in offered and not isinstance(openers[name], str):
                log.warning("falling back from the %s transport, which both ends offer: %s", name, problem.message)
        else:
            return Choice(receiver, bandwidth, "; ".join(failures))
    raise _refused(f"no transport that is required works: {'; '.join(failures)}")


async def _tried_out(
    receiver: BlockReceiver, try_out: Callable[[BlockReceiver], Awaitable[float]]
) -> tuple[BlockReceiver, float]:
    async with contextlib.AsyncExitStack() as unless_it_works:
        unless_it_works.push_async_callback(run_to_end, receiver.close)
        try:
            bandwidth = await try_out(receiver)
        except TransferFailed as failure:
            raise FailedPrecondition(failure.message, reason=failure.reason) from failure
        unless_it_works.pop_all()
    return receiver, bandwidth


def _refused(problem: str) -> FailedPrecondition:
    return FailedPrecondition(problem, reason="TRANSPORT_REFUSED")
