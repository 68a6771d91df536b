"""What a step may hold, learned from what steps have taken: policy without tensors, I/O or a clock.

A prompt chunk that rides beside decoding sequences makes their next token wait for it, which Sarathi-Serve (Agrawal et
al., OSDI 2024) calls stall-free batching as long as the step stays within the latency that users accept. Here the size
of such a step is not a constant to be tuned but follows from a limit in seconds.
"""

__all__ = ["PrefillRate", "StepBudget", "StepTimes"]

STEP_HALF_LIFE = 64.0
TOKEN_HALF_LIFE = 8192.0
MEASURED_PROMPT_TOKENS = 32


class StepTimes:
    """Seconds of a step as `fixed + per_token * tokens`, by least squares in which old steps count less and less.

    A step of no tokens that takes no time is always among the observations. So the line is defined from the first step
    on; where all steps were alike it runs through the origin, until a step of another size shows the fixed part.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        decay = 0.5 ** (1 / STEP_HALF_LIFE)
        self._weight = self._weight * decay + 1.0
        self._x = self._x * decay + num_tokens
        self._y = self._y * decay + seconds
        self._xx = self._xx * decay + num_tokens * num_tokens
        self._xy = self._xy * decay + num_tokens * seconds

    def line(self) -> tuple[float, float]:
        """Seconds of a step: the fixed part, and what each token adds; neither is negative."""
        if self._xx == 0.0:
            return 0.0, 0.0
        weight = self._weight + 1.0  # the step of no tokens
        per_token = (weight * self._xy - self._x * self._y) / (weight * self._xx - self._x * self._x)
        fixed = (self._y - per_token * self._x) / weight
        if fixed < 0.0:
            return 0.0, self._xy / self._xx  # the best line through the origin
        return fixed, max(0.0, per_token)

    def num_tokens_within(self, seconds: float) -> float:
        """Tokens whose step takes so long; infinity where nothing says that tokens take time."""
        fixed, per_token = self.line()
        return max(0.0, seconds - fixed) / per_token if per_token > 0.0 else float("inf")


class PrefillRate:
    """Prompt tokens per second in the steps that computed them, the last few thousand tokens counting most.

    Steps with few prompt tokens are passed over: they tell what a step costs, not what a token does.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def observe(self, num_prompt_tokens: int, seconds: float) -> None:
        if num_prompt_tokens >= MEASURED_PROMPT_TOKENS:
            decay = 0.5 ** (num_prompt_tokens / TOKEN_HALF_LIFE)
            self._tokens = self._tokens * decay + num_prompt_tokens
            self._seconds = self._seconds * decay + seconds

    @property
    def tokens_per_second(self) -> float:
        """0 while unknown."""
        return self._tokens / self._seconds if self._seconds > 0.0 else 0.0


class StepBudget:
    """How many tokens the next step may have.

    Args:
        max_tokens: of any step.
        itl_limit: seconds that a step with decoding sequences in it may take; 0 is no limit.
        least_prompt_tokens: prompt tokens that may always ride along, so that every prompt is done in the end.
    """

    def __init__(self, max_tokens: int, itl_limit: float, least_prompt_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._itl_limit = itl_limit
        self._least_prompt_tokens = least_prompt_tokens
        self._times = StepTimes()
        self._rate = PrefillRate()

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, as measured; 0 while unknown."""
        return self._rate.tokens_per_second

    def observe(self, num_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step of so many tokens, so many of prompts among them, took so long."""
        self._times.observe(num_tokens, seconds)
        self._rate.observe(num_prompt_tokens, seconds)

    def num_tokens(self, num_decoding: int) -> int:
        """Tokens of a step in which so many sequences decode. Their own come first and are never left out for time."""
        if num_decoding == 0 or self._itl_limit == 0.0:
            return self._max_tokens
        within = min(self._times.num_tokens_within(self._itl_limit), float(self._max_tokens))
        if self.prefill_rate > 0.0:
            # Steps that only decode are all alike. After some hundred of them the line says nothing of long ones.
            within = min(within, num_decoding + self.prefill_rate * self._itl_limit)
        return min(self._max_tokens, max(int(within), num_decoding + self._least_prompt_tokens))
