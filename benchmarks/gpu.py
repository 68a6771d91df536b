"""What the engine makes of a GPU, against the limits of that GPU, measured in the same run.

    python -m benchmarks.gpu [--results FOLDER]

Models are of known shapes with random weights made on the device; nothing is downloaded. Decoding starts from
sequences that are adopted with a random KV cache, so that a long context costs no prefill. Takes under 9 minutes.
Exit codes: 0; 1 if a part failed, which leaves the other tables; 2 without a GPU.
"""

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_limits import DeviceLimits, measure_limits
from benchmarks.gpu_model import ModelCase
from benchmarks.gpu_parts import FULL, SMALL, Bench, serve_by_transformers
from benchmarks.results import Row, add_flags, publish

__all__ = ["main"]

log = logging.getLogger("benchmarks.gpu")

NO_GPU = 2
PARTS = ("decode", "prefill", "attention", "serve", "transformers")
CAPTIONS = {
    "decode": "Decoding through scheduler and runner; the limit reads weights and KV cache once per step.",
    "prefill": "Prompts computed 8192 tokens a step; the limit is arithmetic at the measured matrix rate.",
    "attention": "The decode attention kernel alone; bytes of keys and values.",
    "transformers": "The same requests, all at once, through this engine and transformers' generate_batch.",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", action="append", help="which shape; may be repeated; all large ones by default")
    parser.add_argument("--part", action="append", choices=PARTS, help="which part; may be repeated; all by default")
    parser.add_argument("--seconds", type=float, default=520.0, help="no part is begun after so many seconds")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no GPU here", file=sys.stderr)
        return NO_GPU
    return _Run(options).all()


class _Run:
    """Runs parts; what fails leaves the others alone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._device = torch.device(options.device)
        self._sizes = FULL if self._device.type == "cuda" else SMALL
        self._deadline = time.monotonic() + options.seconds
        self._num_failed = 0
        self._name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        self._tables: dict[str, list[Row]] = {"decode": [], "prefill": [], "attention": []}

    def all(self) -> int:
        cases = [
            ModelCase(name, self._device, self._sizes.context_length, max(self._sizes.batches))
            for name in self._options.shape or ("qwen3-0.6b", "llama-3.1-8b")
        ]
        limits = measure_limits(self._device, cases[0].dtype)
        self._publish(
            "gpu-limits",
            [{"copy TB/s": limits.bytes_per_second / 1e12, "TFLOP/s": limits.flops / 1e12}],
            f"A copy on the device, read and written bytes, and a product of large {cases[0].dtype} matrices.",
        )
        self._free_memory()
        rates: dict[str, float] = {}
        for case in cases:
            self._part(case, "engine", partial(self._measure_engine, case, limits, rates))
            self._free_memory()
        for name, rows in self._tables.items():
            if rows:
                self._publish(f"gpu-{name}", rows, CAPTIONS[name])
        # Last, for nobody knows how long another's warm-up takes, and after each shape what is there is written.
        comparison: list[Row] = []
        for case in cases:
            comparison += self._compare(case, rates.get(case.name))
            self._free_memory()
            if comparison:
                self._publish("gpu-transformers", comparison, CAPTIONS["transformers"])
        return 1 if self._num_failed else 0

    def _measure_engine(self, case: ModelCase, limits: DeviceLimits, rates: dict[str, float]) -> None:
        bench = Bench(case, limits, self._sizes)
        for name in self._tables:
            self._part(case, name, partial(self._fill, name, getattr(bench, name)))
        self._part(case, "serve", lambda: rates.update({case.name: bench.serve()}))

    def _compare(self, case: ModelCase, own_rate: float | None) -> list[Row]:
        found: list[float] = []
        self._part(case, "transformers", lambda: found.append(serve_by_transformers(case, self._sizes)))
        if own_rate is None:
            return []
        count, length, output = self._sizes.requests
        return [
            {
                "shape": case.name,
                "requests": f"{count} of {length} + {output} tokens",
                "kvrelay tokens/s": own_rate,
                "transformers tokens/s": found[0] if found else None,
                "ratio": own_rate / found[0] if found else None,
            }
        ]

    def _fill(self, name: str, rows: Callable[[], list[Row]]) -> None:
        self._tables[name] += rows()

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _part(self, case: ModelCase, name: str, run: Callable[[], object]) -> None:
        if name in PARTS and name not in (self._options.part or PARTS):
            return
        if time.monotonic() > self._deadline:
            log.warning("%s: no time left for %s", case.name, name)
            self._num_failed += 1
            return
        started = time.monotonic()
        try:
            run()
        except Exception:
            log.exception("%s: %s failed", case.name, name)
            self._num_failed += 1
        log.info("%s: %s took %.1f s", case.name, name, time.monotonic() - started)

    def _publish(self, name: str, rows: list[Row], caption: str) -> None:
        publish(name, rows, self._options, caption=caption, device=self._name)


if __name__ == "__main__":
    sys.exit(main())
