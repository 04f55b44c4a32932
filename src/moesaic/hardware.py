"""What the machine is: architecture names, processor counts, instruction sets, and the one guarded import of Triton.

`from moesaic.hardware import triton, tl` or `gluon, gl` imports Triton when it is first read, so that `import moesaic`
never does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import interpreter

# Below 8.0 Triton has no bf16 dot and no cp.async: the torch path serves such GPUs.
MIN_COMPUTE_CAPABILITY = (8, 0)


def __getattr__(name: str) -> Any:
    if name in ("triton", "tl") and interpreting():
        interpreter.mend()
    if name == "triton":
        return importlib.import_module("triton")
    if name == "tl":
        return importlib.import_module("triton.language")
    if name == "gluon":
        return importlib.import_module("triton.experimental.gluon")
    if name == "gl":
        return importlib.import_module("triton.experimental.gluon.language")
    if name == "gluon_aggregate":  # private in Triton 3.6
        return importlib.import_module("triton.language.core")._aggregate
    if name == "base_value":
        return importlib.import_module("triton.language.core").base_value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def interpreting() -> bool:
    """True when Triton kernels run in Triton's own CPU interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_gluon() -> bool:
    """Is there the Gluon that our kernels were written in and measured with? It is experimental and changes."""
    return has_triton() and importlib.import_module("triton").__version__.startswith("3.6.")


@functools.cache
def _cuda_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, ... for a GPU, the device's type (`"cpu"`) for anything else."""
    if device.type == "cuda":
        return _cuda_arch(device.index if device.index is not None else torch.cuda.current_device())
    return device.type


@functools.cache
def sm_count(index: int = 0) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@dataclass(frozen=True)
class Gpu:
    """A GPU as choice sees it. Never timed: what is chosen fixes the bits.

    `bandwidth` is its memory's in TB/s, `peak` the dense half-precision rate in TFLOP/s, as published.
    """

    arch: str
    name: str = ""
    processors: int = 132
    bandwidth: float = 4.8
    peak: float = 989.0


# By the start of the driver's name, the longest that fits. To add a GPU, add a line; `moesaic tune` writes its choices.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("sm_80", "A100", 108, 2.0, 312.0),
        Gpu("sm_90", "H100", 132, 3.35, 989.0),
        Gpu("sm_90", "H100 PCIe", 114, 2.0, 756.0),
        Gpu("sm_90", "H100 NVL", 132, 3.9, 835.0),
        Gpu("sm_90", "H800", 132, 3.35, 989.0),
        Gpu("sm_90", "H200", 132, 4.8, 989.0),
        Gpu("sm_90", "GH200", 132, 4.0, 989.0),
        Gpu("sm_90", "GH200 480GB", 132, 4.0, 989.0),
        Gpu("sm_90", "GH200 144G HBM3e", 132, 4.9, 989.0),
        Gpu("sm_90", "H20", 78, 4.0, 148.0),
        Gpu("sm_100", "B200", 148, 8.0, 2250.0),
        Gpu("sm_100", "GB200", 152, 8.0, 2500.0),
    )
}
INTERPRETED = Gpu("cpu", "interpreter", 4)  # where Triton's interpreter runs the kernels


@functools.cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    name = properties.name.removeprefix("NVIDIA ")
    known = max((n for n in GPUS if name.startswith(n)), key=len, default="")
    if known:
        return replace(GPUS[known], arch=_cuda_arch(index), processors=properties.multi_processor_count)
    kilohertz, bits = (getattr(properties, n, 0) for n in ("memory_clock_rate", "memory_bus_width"))
    bandwidth = 2 * kilohertz * 1e3 * bits / 8 / 1e12 or Gpu.bandwidth
    peak = Gpu.peak * properties.multi_processor_count / Gpu.processors
    return Gpu(_cuda_arch(index), name, properties.multi_processor_count, bandwidth, peak)


def gpu_named(name: str, arch: str = "") -> Gpu:
    """A GPU that need not be there: by its name in GPUS, or by its architecture, of which it then is the first.

    Raises:
        ValueError: GPUS has none of that name.
    """
    if name and name not in GPUS:
        raise ValueError(f"gpu: name must be one of {', '.join(GPUS)}, got {name!r}; or give its arch.")
    if name:
        return GPUS[name]
    return next((gpu for gpu in GPUS.values() if gpu.arch == arch), Gpu(arch))


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device: by name, else from the driver's attributes. Of a CPU, what the interpreter stands for."""
    if device.type != "cuda":
        return INTERPRETED
    return _gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache(maxsize=64)
def triton_why_not(device: str, arch: str) -> str | None:
    """Why Triton kernels cannot run on this device, or None."""
    if not has_triton():
        return "triton is not installed (it comes with the CUDA and ROCm builds of torch)"
    if device == "cpu":
        return None if interpreting() else "needs a GPU (or TRITON_INTERPRET=1 to interpret on the CPU)"
    if device != "cuda":
        return f"needs a CUDA or ROCm device, got {device}"
    if arch.startswith("sm_"):
        capability = divmod(int(arch[3:]), 10)
        if capability < MIN_COMPUTE_CAPABILITY:
            return f"needs compute capability {'.'.join(map(str, MIN_COMPUTE_CAPABILITY))} or newer, got {arch}"
    return None


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo (empty where there is none)."""
    try:
        with open("/proc/cpuinfo") as lines:
            pairs = (line.split(":", 1) for line in lines.read().split("\n\n")[0].splitlines() if ":" in line)
            return {key.strip().lower(): value.strip() for key, value in pairs}
    except OSError:
        return {}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags of this CPU as Linux names them (empty where they cannot be read)."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("features") or "").split())


def cpu_vendor() -> str:
    """`"GenuineIntel"`, `"AuthenticAMD"`, or the empty string."""
    return _cpuinfo().get("vendor_id", "")


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()
