"""The requests that schedules ask, each with its own way through the cluster."""

from random import Random

from kvrelay.client import GenerateOptions
from tests.checkpoints import VOCAB_SIZE

__all__ = ["CATALOG", "LONG", "SHORT", "WIDE"]

# More than half of a decode worker's pool, so that its blocks are taken when the prompt's last chunk is announced.
WIDE_TOKENS = 520
# So many steps that a worker which drains, and tells so for half a second, has to move it.
LONG_TOKENS = 400


def _short(random: Random, number: int) -> GenerateOptions:
    length = random.choice([2, 7, 16, 40, 64, 100])
    ask = _ask(random, length, max_tokens=random.choice([1, 5, 12, 24, 40]))
    ask["temperature"] = 0.0 if number % 2 else 0.9
    ask["ignore_eos"] = number % 5 > 0
    if number % 3 == 0:
        ask["logprobs"] = number % 4
    if number % 4 == 0:
        ask["stop"] = [random.choice("aeiost"), "zz"]
    return ask


def _ask(random: Random, length: int, max_tokens: int) -> GenerateOptions:
    return GenerateOptions(
        token_ids=[random.randrange(3, VOCAB_SIZE - 20) for _ in range(length)],
        max_tokens=max_tokens,
        temperature=0.9,
        seed=random.randrange(1 << 32),
        ignore_eos=True,
    )


def _catalog() -> tuple[GenerateOptions, ...]:
    random = Random(20261125)
    asks = [_short(random, number) for number in SHORT]
    asks += [_ask(random, WIDE_TOKENS, max_tokens=12) for _ in WIDE]
    asks += [_ask(random, 7, max_tokens=LONG_TOKENS) for _ in LONG]
    return tuple(asks)


# Places in the catalog.
SHORT, WIDE, LONG = range(32), range(32, 35), range(35, 39)
CATALOG = _catalog()
