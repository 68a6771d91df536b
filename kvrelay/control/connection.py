"""The one way to Redis: a connection that is checked once, and errors that say nothing of Redis.

Redis holds what may be lost: leases, the queue, request records. So an operation is tried for about a second and no
longer; a frozen Redis delays nobody for more than twice that.
"""

import contextlib
import logging
import re
import secrets
from collections.abc import Iterator

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from kvrelay.errors import ConfigurationError, Unavailable

__all__ = ["connect", "redacted", "redis_errors_as_unavailable"]

_LOGGER = logging.getLogger(__name__)

MAX_CONNECTIONS = 16


async def connect(url: str, *, timeout: float = 1.0) -> Redis:
    """A client whose server answers, takes writes and runs scripts.

    Texts are decoded; bytes that are no UTF-8 come as surrogates, so that foreign data fails a check, not the decoder.

    Args:
        url: redis://, rediss:// or unix://.
        timeout: seconds for one operation, and for a free connection when all are in use.

    Raises:
        ConfigurationError: nobody answers, the credentials are refused, or the server takes no writes.
    """
    client = _client(url, timeout)
    async with contextlib.AsyncExitStack() as unless_usable:
        unless_usable.push_async_callback(client.aclose)
        try:
            await _check(client)
        except (RedisError, OSError) as error:
            raise ConfigurationError(f"Redis at {redacted(url)}: {_explanation(error)}") from error
        unless_usable.pop_all()
    return client


@contextlib.contextmanager
def redis_errors_as_unavailable() -> Iterator[None]:
    """Turns whatever Redis or its client complain about into Unavailable; the log keeps the text.

    Raises:
        Unavailable: with reason REDIS_UNAVAILABLE.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        _LOGGER.debug("Redis failed", exc_info=error)
        raise Unavailable(
            "The queue state is not reachable; try again.", reason="REDIS_UNAVAILABLE", retry_after=1.0
        ) from error


def redacted(url: str) -> str:
    """The URL without its password."""
    url = re.sub(r"(://[^:@/]*:)[^/]*@", r"\1***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


def _client(url: str, timeout: float) -> Redis:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # The pool looks at a connection before it lends it. The client's own health checks would add a round trip,
            # and recurse without end (redis 8.1) where a server wants a password that was not given.
            health_check_interval=0,
            # A lost connection is worth one more try, for all scripts can be repeated; a silent server is not.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
            protocol=2,
            decode_responses=True,
            encoding_errors="surrogateescape",
        )
    except ValueError as error:
        raise ConfigurationError(
            f"Redis URL {redacted(url)}: must be redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH"
        ) from error
    return Redis.from_pool(pool)


async def _check(client: Redis) -> None:
    probe = f"kvrelay:probe:{secrets.token_hex(8)}"
    await client.ping()
    await client.set(probe, "1", px=1000)
    await client.eval("return redis.call('DEL', KEYS[1])", 1, probe)


def _explanation(error: Exception) -> str:
    # The client wraps what a server says while a connection is made.
    match error.__cause__ if isinstance(error.__cause__, AuthenticationError) else error:
        case AuthenticationError():
            return "refuses the user name or password"
        case ReadOnlyError():
            return "is a read-only replica; name its primary"
        case OutOfMemoryError():
            return "is out of memory; raise its maxmemory"
        case TimeoutError():
            return "does not answer in time"
        case ConnectionError() | OSError():
            return f"cannot be reached: {error}"
    return f"refuses to work: {error}"
