"""The SDK: `Client`, and `AsyncClient` with the same methods, awaitable.

with Client("localhost:50051") as client:
    for chunk in client.generate("Once upon a time", max_tokens=64):
        print(chunk.text, end="")
"""

from kvrelay.client.asynchronous import AsyncClient, AsyncStream
from kvrelay.client.shared import Completion, GenerateOptions
from kvrelay.client.sync import Client, Stream

__all__ = ["AsyncClient", "AsyncStream", "Client", "Completion", "GenerateOptions", "Stream"]
