"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence

__all__ = ["StopScanner"]


class StopScanner:
    """Lets text through up to the first stop string.

    The first is the one whose last character comes first; of several that end together, the longest. So the result
    does not depend on how the text was cut into pieces. Held back is only what may be the beginning of a stop string.

    Attributes:
        matched: a stop string has been found; nothing comes any more.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._matchers = [_Matcher(string) for string in dict.fromkeys(stop)]
        self._first_characters = {string[0] for string in stop}
        self._held = ""
        self.matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what is certain to stand before any stop string, and whether one was found."""
        if self.matched:
            return "", True
        if not self._held and self._first_characters.isdisjoint(text):
            return text, False
        seen = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            found = [len(matcher.string) for matcher in self._matchers if matcher.advance(character)]
            if found:
                self.matched, self._held = True, ""
                return seen[: position - max(found)], True
        return self._hold_back(seen), False

    def flush(self) -> str:
        """Returns what was held back, since nothing follows."""
        held, self._held = self._held, ""
        return held

    def _hold_back(self, seen: str) -> str:
        certain = len(seen) - max(matcher.length for matcher in self._matchers)
        self._held = seen[certain:]
        return seen[:certain]


class _Matcher:
    """Knuth, Morris and Pratt's search for one string, a character at a time.

    Attributes:
        length: how much of the string's beginning is the end of what was seen.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._fallback = _fallback_lengths(string)

    def advance(self, character: str) -> bool:
        """Takes one character; says whether it completes the string."""
        while self.length and self.string[self.length] != character:
            self.length = self._fallback[self.length]
        if self.string[self.length] == character:
            self.length += 1
        return self.length == len(self.string)


def _fallback_lengths(string: str) -> list[int]:
    """For each length n, the length of the longest proper prefix of string[:n] that is also its suffix."""
    lengths = [0] * (len(string) + 1)
    length = 0
    for index in range(1, len(string)):
        while length and string[index] != string[length]:
            length = lengths[length]
        length += string[index] == string[length]
        lengths[index + 1] = length
    return lengths
