"""Which transport a pair of workers uses. A faster one that both ends share comes first."""

import logging

from kv_transfer.grpc_stream import GrpcReceiver
from kv_transfer.shm import ShmReceiver
from kv_transfer.transport import BlockReceiver
from kvrelay.control.registry import ShmOffer
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition

__all__ = ["choose_transport"]

log = logging.getLogger(__name__)


def choose_transport(preference: str, offer: ShmOffer | None, epoch: int, cache: KvCache) -> BlockReceiver:
    """The receiver for blocks of one prefill worker, tried out.

    Args:
        preference: "auto", "shm" or "grpc"; all but auto force that transport.
        offer: the prefill worker's pool, as the registry has it.
        epoch: the prefill worker's.

    Raises:
        FailedPrecondition: the forced transport cannot work between these two.
    """
    if preference == "grpc":
        return GrpcReceiver(cache)
    try:
        return ShmReceiver.open_pool(offer, epoch, cache)
    except FailedPrecondition as problem:
        if preference == "shm":
            raise
        log.info("falling back to the grpc transport: %s", problem.message)
        return GrpcReceiver(cache)
