import numpy

from kvrelay.engine.philox import philox4x32, uniforms

# Known-answer tests that come with Random123 (kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_known_answers_as_one_batch() -> None:
    counters = numpy.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], dtype=numpy.uint32)
    keys = numpy.array([words(key) for _, key, _ in KNOWN_ANSWERS], dtype=numpy.uint32)
    assert philox4x32(counters, keys).tolist() == [words(answer) for _, _, answer in KNOWN_ANSWERS]


def test_a_number_depends_on_its_own_row_only() -> None:
    seeds = [0, 2**64 - 1, 7, 7]
    alone = [uniforms([seed], [position])[0] for position, seed in enumerate(seeds)]
    assert uniforms(seeds, range(4)).tolist() == alone
    assert len(set(alone)) == 4


def test_every_part_of_the_name_matters() -> None:
    numbers = [
        uniforms([5], [9])[0],
        uniforms([5 + (1 << 32)], [9])[0],
        uniforms([6], [9])[0],
        uniforms([5], [10])[0],
        uniforms([5], [9], 1)[0],
    ]
    assert len(set(numbers)) == len(numbers)


def test_numbers_never_change() -> None:
    """Two versions of kvrelay must draw the same, or a request could not be continued by the other."""
    assert uniforms([1234567890123456789], [42], 3)[0] == 0.35539083065569577


def test_numbers_are_uniform() -> None:
    numbers = uniforms(numpy.arange(100_000), numpy.full(100_000, 17))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = numpy.histogram(numbers, bins=100, range=(0, 1))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom; outside with a probability of about 1e-3
