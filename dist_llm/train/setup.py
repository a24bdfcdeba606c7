"""From a config to the parts of a run: device and dtype chosen from what is there, mesh, engine."""

from __future__ import annotations

import contextlib
import ctypes
from importlib import import_module

import torch

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config, RuntimeConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import UsageError
from dist_llm.mesh import Mesh, build_mesh, default_backend
from dist_llm.parallel.compose import Options
from dist_llm.train.base import Base
from dist_llm.train.begin import take_base

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(runtime: RuntimeConfig, *, local_rank: int) -> torch.device:
    """The device of a rank: CUDA where there is one, unless `runtime.device` says otherwise.

    Raises UsageError where NCCL would get two ranks on one device: ask for the last rank of a machine first.
    """
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device here", where="runtime.device", expected="a CUDA device", found="none", next="dist-llm doctor")
    count = torch.cuda.device_count()
    if local_rank >= count and backend_name(runtime) == "nccl":
        found = f"{local_rank + 1} ranks, {count} GPU{'' if count == 1 else 's'}"
        expected, way = "a GPU for each rank", "the same command with runtime.device=cpu, or fewer ranks"
        raise UsageError("there are more ranks than GPUs on this machine", where="runtime.device", expected=expected, found=found, next=way)
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def settle_rank(runtime: RuntimeConfig) -> None:
    """Sets what holds for the whole process of a rank: CPU threads, denormals to zero (they make a step 30 times slower), malloc."""
    torch.set_num_threads(runtime.threads or 1)
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the kernel when they are freed, and every step would have the same pages made and zeroed anew.

    With higher thresholds they stay: a tensor of 32 MB is filled in 9 ms instead of 31. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, 2**30)


def choose_dtype(runtime: RuntimeConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: bfloat16 on CUDA, float32 on CPU, unless `runtime.dtype` says otherwise."""
    if runtime.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[runtime.dtype]


FP8_NEEDS = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # CUDA compute capability


def refuse_fp8(runtime: RuntimeConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError where the device has no 8-bit products, or the blocks are not bfloat16. A CPU multiplies them in float32."""
    if runtime.fp8 == "off":
        return
    if dtype != torch.bfloat16:
        found = str(dtype).removeprefix("torch.")
        raise UsageError("8-bit products belong to bfloat16 blocks", where="runtime.fp8", expected="runtime.dtype=bfloat16", found=found)
    needed = FP8_NEEDS[runtime.fp8]
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < needed:
        expected, found = (f"compute capability {major}.{minor}" for major, minor in (needed, has))
        raise UsageError("this GPU has no 8-bit products", where="runtime.fp8", expected=f"at least {expected}", found=found)


def refuse_graph(runtime: RuntimeConfig, device: torch.device, *, world: int) -> None:
    """Raises UsageError where a step cannot be a CUDA graph on what is here."""
    if runtime.cuda_graph and device.type != "cuda":
        raise UsageError("only a CUDA device has graphs", where="runtime.cuda_graph", expected="a CUDA device", found=device.type)
    if runtime.cuda_graph and world > 1 and backend_name(runtime) != "nccl":
        expected, found = "backend nccl, whose transfers are kernels", f"backend {backend_name(runtime)}"
        raise UsageError("this backend's transfers cannot be in a graph", where="runtime.cuda_graph", expected=expected, found=found)


def backend_name(runtime: RuntimeConfig) -> str:
    """NCCL where ranks get CUDA devices, gloo on CPU, unless `runtime.backend` says otherwise; touches no device."""
    cuda = runtime.device != "cpu" and torch.cuda.is_available()
    return default_backend("cuda" if cuda else "cpu") if runtime.backend == "auto" else runtime.backend


def num_micro_batches(config: Config, layout: Layout) -> int:
    """Micro-batches of one data-parallel rank in a step: global batch = dp x micro-batches x micro."""
    count, rest = divmod(config.batch.global_, layout.dp * config.batch.micro)
    assert rest == 0 and count > 0, (config.batch, layout)
    return count


def make_mesh(config: Config, layout: Layout, rank: int) -> Mesh:
    """The mesh of a layout with the groups that this model needs."""
    model, shared_memory = config.model, config.runtime.shared_memory
    return build_mesh(layout, rank, tied=model.tied, kv_heads=model.kv_heads, shared_memory=shared_memory)


ENGINES = {  # imported when asked for: each brings its library
    "native": "dist_llm.engines.native:NativeEngine",
    "ddp": "dist_llm.engines.ddp:DdpEngine",
    "fsdp2": "dist_llm.engines.fsdp2:Fsdp2Engine",
    "deepspeed": "dist_llm.engines.deepspeed:DeepSpeedEngine",
}


def make_engine(config: Config, mesh: Mesh, *, device: torch.device, dtype: torch.dtype, base: bool = True) -> NativeEngine:
    """The engine that `layout.engine` names, with initial weights or those of the config's base; the others have the native one's calls.

    base: False leaves the base to the caller.

    Raises UsageError where `runtime.fp8` or `runtime.cuda_graph` asks for what the device cannot do.
    """
    refuse_fp8(config.runtime, device, dtype)
    refuse_graph(config.runtime, device, world=mesh.layout.world)
    options = Options(
        sequence=config.data.sequence,
        micro=config.batch.micro,
        micro_batches=num_micro_batches(config, mesh.layout),
        dtype=dtype,
        device=device,
        seed=config.runtime.seed,
        fixed=config.runtime.reduce_order == "fixed",
        smoothing=config.optimizer.label_smoothing,
        compiled=config.runtime.compile,
        offload_dir=config.runtime.offload_dir,
        fp8=config.runtime.fp8,
        graph=config.runtime.cuda_graph,
        pairs=config.preference.loss is not None,
    )
    module, name = ENGINES[mesh.layout.engine].split(":")
    engine = getattr(import_module(module), name)(config.model, config.optimizer, mesh, options)
    if base and config.base is not None:
        take_base(engine, Base(config.base))
    return engine
