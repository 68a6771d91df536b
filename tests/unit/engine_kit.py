"""The whole engine on a small random checkpoint, for tests of what its parts make together."""

from collections import defaultdict
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.events import Event, Failed, Finished, Sampled
from kvrelay.engine.limits import Limits
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Role, Sequence
from kvrelay.request import Request, Sampling, Token
from kvrelay.settings import EngineSettings

BLOCK_SIZE = 5
EOS = 1  # at which transformers ends a completion, too


class Kit:
    """An engine over a checkpoint, and what it told: the tokens of each request, and how it ended."""

    def __init__(self, path: Path, *, max_batched_tokens: int = 64, **settings: Any) -> None:
        settings = {"block_size": BLOCK_SIZE, "num_blocks": 60, "max_num_sequences": 6, **settings}
        self.runner = ModelRunner.load(path, EngineSettings(max_batched_tokens=max_batched_tokens, **settings))
        self.limits = Limits(
            max_num_sequences=settings["max_num_sequences"],
            max_batched_tokens=max_batched_tokens,
            context_length=self.runner.context_length,
            block_size=self.runner.layout.block_size,
        )
        self.reset()

    def reset(self) -> None:
        """A new scheduler and an empty cache, over the same model and the same state on its device."""
        self.scheduler = Scheduler(BlockPool(self.runner.num_blocks), self.limits)
        self.engine = Engine(self.scheduler, self.runner)
        self.tokens: defaultdict[str, list[Token]] = defaultdict(list)
        self.ends: dict[str, Event] = {}
        self._num_added = 0

    def add(self, request_id: str, prompt: Items[int], role: Role = Role.WHOLE, **sampling: Any) -> Sequence:
        sampling = {"stop_token_ids": frozenset([EOS]), **sampling}
        sequence = Sequence(Request(request_id, tuple(prompt), Sampling(**sampling)), role, float(self._num_added))
        self._num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        """One step; false when nothing was left to do."""
        output = self.engine.step()
        for event in output.events:
            if isinstance(event, Sampled):
                assert event.index == len(self.tokens[event.request_id])
                self.tokens[event.request_id].append(event.token)
            elif isinstance(event, Finished | Failed):
                assert not isinstance(event, Failed), "see the log"
                assert event.request_id not in self.ends
                self.ends[event.request_id] = event
        return not output.idle

    def drain(self) -> None:
        """Steps until nothing is left; then every block is free."""
        while self.step():
            pass
        self.scheduler.check_integrity()
        assert self.scheduler.load().blocks_free == self.runner.num_blocks

    def token_ids(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.tokens[request_id]]
