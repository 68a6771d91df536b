"""`kvrelay bench` on the command line. Light, because every command loads it: the rest comes when it runs."""

import argparse
import sys
from typing import Any

from kvrelay.bench.flags import FLAGS

__all__ = ["add_to"]

_DESCRIPTION = """
Sends requests to a running cluster and measures: time to first token, gaps between tokens, end-to-end time, throughput
and goodput. Output lengths are forced. Ctrl-C ends the load and reports what there is.
"""


def add_to(subparsers: Any) -> None:
    """Adds the command to the command line's parser."""
    command: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure a running cluster under load", description=_DESCRIPTION, allow_abbrev=False
    )
    command.add_argument("--target", metavar="HOST:PORT", help="gateway (KVRELAY_TARGET, else localhost:50051)")
    for flag in FLAGS:
        default = f" (default {flag.default})" if flag.default else ""
        command.add_argument(flag.name, metavar=flag.metavar, help=flag.help + default)
    command.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    command.add_argument("--no-progress", action="store_true", help="no progress bar, on a terminal either")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from kvrelay.bench.runner import run_and_report
    from kvrelay.bench.settings import parse

    settings = parse(vars(arguments))
    show_progress = sys.stderr.isatty() and not arguments.no_progress
    return run_and_report(settings, arguments.target, as_json=arguments.json, show_progress=show_progress)
