"""Puts the tables of benchmarks/results into the documents.

    python -m benchmarks.tables           # rewrites them
    python -m benchmarks.tables --check   # fails if a document differs from the results

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and comes from `results/NAME.json`.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import results

__all__ = ["DOCUMENTS", "render", "update_documents"]

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "peers.md")
SECTION = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
MISSING = "Not measured yet.\n"


def render(document: str, folder: Path = results.FOLDER) -> str:
    """The document with each table as the results in `folder` have it."""

    def section(match: re.Match[str]) -> str:
        path = folder / f"{match[1]}.json"
        table = results.load(path).markdown() if path.exists() else MISSING
        return f"{match[1]}{match[2]}{table}"

    return SECTION.sub(section, document)


def update_documents(folder: Path = results.FOLDER) -> None:
    """Rewrites the tables of all documents."""
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(encoding="utf-8"), folder), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document differs")
    arguments = parser.parse_args()
    if not arguments.check:
        return update_documents()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    stale = [str(path.relative_to(ROOT)) for path, text in texts.items() if render(text) != text]
    sys.exit(f"differ from benchmarks/results: {', '.join(stale)}" if stale else 0)


if __name__ == "__main__":
    main()
