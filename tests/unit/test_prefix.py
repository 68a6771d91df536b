import pytest

from kvrelay.engine.prefix import block_digests, root_digest

ROOT = root_digest(b"model", "salt")


def test_only_full_blocks_have_names() -> None:
    assert [len(block_digests(ROOT, range(length), 4)) for length in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]


def test_a_name_is_a_whole_sha256() -> None:
    assert {len(digest) for digest in (ROOT, *block_digests(ROOT, range(12), 4))} == {32}


def test_a_name_stands_for_the_whole_prefix() -> None:
    names = block_digests(ROOT, range(12), 4)
    assert len(set(names)) == 3
    assert block_digests(ROOT, [*range(8), 0, 0, 0, 0], 4)[:2] == names[:2]
    changed = block_digests(ROOT, [99, *range(1, 12)], 4)
    assert not set(changed) & set(names)


def test_a_chain_goes_on_from_any_of_its_names() -> None:
    names = block_digests(ROOT, range(20), 4)
    assert block_digests(names[1], range(8, 20), 4) == names[2:]


@pytest.mark.parametrize(
    ("model_digest", "salt"), [(b"other", "salt"), (b"model", ""), (b"model", "salt2"), (b"tmodel", "sal")]
)
def test_models_and_salts_have_names_of_their_own(model_digest: bytes, salt: str) -> None:
    root = root_digest(model_digest, salt)
    assert root != ROOT
    assert not set(block_digests(root, range(12), 4)) & set(block_digests(ROOT, range(12), 4))


def test_neighbouring_tokens_do_not_run_into_each_other() -> None:
    assert block_digests(ROOT, [1, 23], 2) != block_digests(ROOT, [12, 3], 2)
    assert block_digests(ROOT, [256, 0], 2) != block_digests(ROOT, [0, 256], 2)
    assert len(block_digests(ROOT, [2**32 - 1] * 4, 4)) == 1
