"""Compiles the Triton kernels to machine code for Hopper (sm_90), launching none, so that no GPU is needed.

The kernels' own host code runs, on the CPU's tensors, so what is compiled is what it asks for. Prints one line for
each kernel that was compiled: its module, its name, and the bytes of machine code.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvrelay.engine.batch import Batch
from kvrelay.engine.batch_state import BatchState
from kvrelay.engine.kernels.gpu.feed import GpuFeed
from kvrelay.engine.kernels.gpu.kernels import GpuKernels
from kvrelay.engine.kernels.gpu.sampling import SamplingTensors, sample_tokens
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout

CPU = torch.device("cpu")
KERNELS = GpuKernels()


class Hopper:
    """As much of a Triton driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching() -> None:
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> object:
        compiled = run(self, *args, **kwargs | {"warmup": True})
        print(self.fn.__module__.rpartition(".")[2], self.fn.__name__, len(compiled.asm["cubin"]), flush=True)
        return compiled

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only


def compile_layer(
    dtype: torch.dtype, heads: tuple[int, int, int], hidden: int, *, norms: bool, softcap: float | None
) -> None:
    """All that a layer calls, for decodes and for chunks.

    Args:
        heads: query heads, KV heads, head dimension.
    """
    num_heads, num_kv_heads, head_dim = heads
    layout = KvLayout(b"", str(dtype).removeprefix("torch."), 16, 2, num_kv_heads, head_dim)
    cache = KvCache(layout, 2, CPU)
    weight = torch.ones(head_dim, dtype=dtype)
    angles = torch.zeros(6, head_dim // 2)
    states = torch.zeros(6, hidden, dtype=dtype)
    KERNELS.add_rms_norm(states, None, states[0], 1e-6)
    KERNELS.add_rms_norm(states, states.clone(), states[0], 1e-6)
    KERNELS.gated_silu(torch.zeros(6, 6 * hidden, dtype=dtype))
    fused = torch.zeros(6, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    head_norms = HeadNorms(weight, weight, 1e-6) if norms else None
    for max_context_length in (64, 4096):  # in one piece, and in several
        batch = make_batch(max_context_length)
        query = KERNELS.rotate_and_store(fused, Rotation(angles, angles), head_norms, cache, 1, batch)
        KERNELS.attend(query, cache, 1, batch, 0.125, softcap)
    key = torch.zeros(num_kv_heads, 6, head_dim, dtype=dtype).transpose(0, 1)
    KERNELS.store(key, key, cache, 1, batch)
    cache.close()


def make_batch(max_context_length: int) -> Batch:
    """Two decodes, then a chunk of four tokens."""
    return Batch(
        positions=torch.zeros(6, dtype=torch.int64),
        rows=torch.zeros(6, dtype=torch.int64),
        query_starts=torch.tensor([0, 1, 2, 6], dtype=torch.int32),
        context_lengths=torch.full((3,), 4, dtype=torch.int32),
        block_tables=torch.zeros(3, max_context_length // 16, dtype=torch.int32),
        num_decodes=2,
        max_context_length=max_context_length,
    )


def compile_sampling(vocabulary: int) -> None:
    numbers, counts = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    sampling = SamplingTensors(numbers, counts.int(), numbers, numbers, counts, counts)
    sample_tokens(torch.zeros(2, vocabulary), sampling)


def compile_feed() -> None:
    state = BatchState(8, 16, CPU)
    rows, tokens = state.view(8), torch.zeros(8, dtype=torch.int64)
    feed = GpuFeed()
    feed.begin(rows, state.last_tokens, 16, 1024)
    feed.end(rows, state.last_tokens, tokens, tokens.expand(2, -1).contiguous(), tokens[:1])


if __name__ == "__main__":
    compile_instead_of_launching()
    compile_layer(torch.bfloat16, (32, 8, 128), 4096, norms=True, softcap=None)
    compile_layer(torch.bfloat16, (8, 4, 256), 2560, norms=False, softcap=50.0)
    compile_layer(torch.float32, (14, 2, 80), 896, norms=False, softcap=None)
    compile_sampling(151936)
    compile_sampling(500)
    compile_feed()
