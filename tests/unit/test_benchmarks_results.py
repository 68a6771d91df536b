"""What benchmarks write, and that the documents show it."""

import argparse
from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.results import Measure, Result, measure

ROWS: list[results.Row] = [
    {"mode": "continuous", "tokens/s": measure([912.4, 100.0, 1234.5]), "steps": 12345, "gain": 2.71828},
    {"mode": "static", "tokens/s": measure([3.0]), "note": None},
]


def flags(folder: Path, *, quick: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    results.add_flags(parser)
    return parser.parse_args(["--results", str(folder), *["--quick"] * quick])


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_results_that_are_committed(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert tables.render(text) == text, "run `python -m benchmarks.tables`"


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_every_section_has_an_end(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert len(tables.SECTION.findall(text)) == text.count("<!-- table: ") == text.count("<!-- end -->")


def test_every_committed_result_is_in_a_document() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in tables.DOCUMENTS)
    stray = [path.name for path in results.FOLDER.glob("*.json") if f"<!-- table: {path.stem} -->" not in shown]
    assert stray == []


def test_a_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    result = Result("name", "python -m benchmarks.name", ROWS, "Caption.")
    assert results.load(results.save(result, tmp_path)) == result
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]


def test_the_table_has_all_columns_and_short_numbers() -> None:
    lines = Result("name", "python -m benchmarks.name", ROWS, "Caption.").markdown().splitlines()
    assert lines[:4] == [
        "| mode | tokens/s | steps | gain | note |",
        "| --- | --- | --- | --- | --- |",
        "| continuous | 912 (100–1,234) | 12,345 | 2.72 | – |",
        "| static | 3 | – | – | – |",
    ]
    assert lines[5].startswith("Caption. Medians, with least and most in brackets. `python -m benchmarks.name` on 20")


def test_the_source_names_machine_and_versions() -> None:
    machine, versions = results.machine("a GPU"), results.versions(("torch", "no-such-package"))
    assert machine["device"] == "a GPU"
    assert machine["cores"].endswith(" cores")
    assert "device" not in results.machine()
    assert set(versions) == {"Python", "torch"}


def test_a_measure_is_the_median_and_the_spread() -> None:
    assert measure(value for value in (3.0, 1.0, 2.0)) == Measure(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="nothing"):
        measure([])


def test_rendering_replaces_tables_and_nothing_else(tmp_path: Path) -> None:
    results.save(Result("one", "command", [{"a": 1}]), tmp_path)
    document = (
        "before\n<!-- table: one -->\nold | table\n<!-- end -->\nbetween\n<!-- table: two -->\n<!-- end -->\nafter\n"
    )
    rendered = tables.render(document, tmp_path)
    assert rendered.startswith("before\n<!-- table: one -->\n| a |\n| --- |\n| 1 |\n")
    assert "old" not in rendered
    assert "<!-- end -->\nbetween\n<!-- table: two -->\nNot measured yet.\n<!-- end -->\nafter\n" in rendered
    assert tables.render(rendered, tmp_path) == rendered


def test_publishing_writes_a_file_unless_it_is_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.publish("quick", ROWS, flags(tmp_path, quick=True))
    results.publish("real", ROWS, flags(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["real.json"]
    assert capsys.readouterr().out.count("| continuous |") == 2
