"""Where a request's time went and what it took."""

import time
from dataclasses import dataclass, field, replace

from kvrelay.request import Timings
from kvrelay.v1 import worker_pb2

__all__ = ["Account"]


@dataclass(slots=True)
class Account:
    """What is known of a request, as far as it has come.

    Attributes:
        arrival: on the clock of `time.monotonic`.
    """

    arrival: float = field(default_factory=time.monotonic)
    timings: Timings = field(default_factory=Timings)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def left_queue(self) -> None:
        self.timings = replace(self.timings, gateway_queue=time.monotonic() - self.arrival)

    def prefilled(self, said: "worker_pb2.FirstToken | worker_pb2.LocalPrompt") -> None:
        """The first token is here. The first prefill counts; a later one only makes up for what was lost."""
        if not self.timings.time_to_first_token:
            self.num_cached_tokens = said.cached_tokens
            self.timings = replace(
                self.timings,
                prefill_queue=said.prefill_queue,
                prefill=said.prefill,
                time_to_first_token=time.monotonic() - self.arrival,
            )

    def decoded(self, response: worker_pb2.DecodeResponse) -> None:
        self.timings = replace(
            self.timings,
            transfer=response.transfer,
            decode_queue=response.decode_queue,
            first_decode_step=response.first_decode_step,
        )
