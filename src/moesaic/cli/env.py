"""`moesaic env`: what is installed, what the machine is, which implementation of each operator runs here, and why."""

from __future__ import annotations

import importlib
import os
import platform
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ..bench import report
from ..bench.libraries import found
from ..bench.peers import PEERS
from ..cases import CASES
from ..hardware import MIN_COMPUTE_CAPABILITY, arch_of, cpu_flags, cpu_name, cpu_vendor, interpreting, sm_count
from ..op import explain
from .screen import Device, Json, Screen, pick_device

# The instruction sets that decide how fast a CPU multiplies.
_CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)
_EXTRAS = {"hf": ("transformers", "safetensors"), "cli": ("typer", "rich"), "plot": ("matplotlib",)}


def env(device: Device = "auto", as_json: Json = False) -> None:
    """Show versions, the machine, and which implementation of each operator runs here and why."""
    screen, here = Screen(as_json), pick_device(device)
    with screen.alone():
        facts = {
            "device": str(here), "versions": report.versions(), "platform": platform.platform(), "cpu": _cpu(),
            "gpus": [_gpu(i) for i in range(torch.cuda.device_count())], "extras": _extras(),
            "peers": {name: found(_module(name)) for name in PEERS}, "triton_interpreter": interpreting(),
            "implementations": [explained(op, fields) for op, fields in typical(here)],
        }  # fmt: skip
    _show(screen, facts)
    screen.emit(facts)


def typical(device: torch.device) -> list[tuple[str, dict[str, Any]]]:
    """One ordinary call of each operator, in a Qwen3-30B-A3B layer: its name, and what `explain` takes."""
    case, half, single = CASES["qwen3-30b-a3b"], torch.bfloat16, torch.float32
    common: dict[str, Any] = dict(device=device.type, dtype=half)
    return [
        ("route", dict(device=device.type, dtype=single, num_tokens=512, top_k=case.top_k,
                       num_experts=case.num_experts)),
        ("permute", dict(**common, top_k=case.top_k, hidden_size=case.hidden_size)),
        ("grouped_matmul", dict(**common, num_rows=512 * case.top_k, num_experts=case.num_experts,
                                hidden_size=case.hidden_size, intermediate_size=2 * case.intermediate_size)),
        ("fused_experts", case.problem(1, half, device.type)),
        ("fused_experts", case.problem(512, half, device.type, training=True)),
        ("fused_experts", case.problem(512, single, device.type, training=True)),
    ]  # fmt: skip


def explained(op: str, fields: dict[str, Any]) -> dict[str, Any]:
    told = explain(op, **fields)
    return {"op": op, "problem": str(told.problem), "chosen": told.chosen, "reasons": dict(told.reasons)}


def _cpu() -> dict[str, Any]:
    flags = cpu_flags()
    native = importlib.import_module("moesaic.ops.fused_experts._cpu_build")
    return {
        "native_kernels": native.status(),
        "name": cpu_name(), "vendor": cpu_vendor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "features": [f for f in _CPU_FEATURES if f in flags],
    }  # fmt: skip


def _gpu(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    arch, properties = arch_of(device), torch.cuda.get_device_properties(index)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(index)
    return {
        "index": index, "name": properties.name, "arch": arch, "memory_GB": properties.total_memory / 1e9,
        "processors": sm_count(index), "capability": capability,
        "fast_path": capability is None or capability >= MIN_COMPUTE_CAPABILITY,
    }  # fmt: skip


def _extras() -> dict[str, dict[str, bool]]:
    return {extra: {package: found(package) for package in packages} for extra, packages in _EXTRAS.items()}


def _module(peer: str) -> str:
    """The package whose presence says that a peer may run."""
    names = {"hf_grouped_mm": "transformers", "sonic": "sonicmoe", "liger": "liger_kernel"}
    return "torch" if peer.startswith("torch") else names.get(peer, peer)


# ---------------------------------------------------------------- screen
def _show(screen: Screen, facts: dict[str, Any]) -> None:
    screen.title("moesaic env", "What is installed, what this machine is, and what runs here.")
    facts_table = Table(show_header=False, box=None, pad_edge=False)
    facts_table.add_column(style="bold", no_wrap=True)
    facts_table.add_column()
    facts_table.add_row("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    facts_table.add_row("system", facts["platform"])
    cpu = facts["cpu"]
    facts_table.add_row(
        "CPU", f"{cpu['name']} ({cpu['cores']} cores, {cpu['threads']} threads): {' '.join(cpu['features'])}"
    )
    facts_table.add_row("CPU kernels", cpu["native_kernels"])
    for gpu in facts["gpus"]:
        facts_table.add_row(f"GPU {gpu['index']}", _gpu_line(gpu))
    if not facts["gpus"]:
        facts_table.add_row("GPU", f"none that torch {torch.__version__} can see")
    for extra, packages in facts["extras"].items():
        absent = [p for p, here in packages.items() if not here]
        line = f'{", ".join(absent)} missing: pip install "moesaic[{extra}]"' if absent else "installed"
        facts_table.add_row(f"extra [{extra}]".replace("[", r"\["), Text(line, style="yellow" if absent else "green"))
    screen.print(facts_table)
    screen.print()
    screen.print(implementations_table(facts["implementations"], f"Implementations on {facts['device']}"))
    if not facts["triton_interpreter"] and facts["device"] == "cpu":
        screen.print("[dim]TRITON_INTERPRET=1 makes the Triton kernels run on the CPU, slowly, to check them.[/dim]")


def _gpu_line(gpu: dict[str, Any]) -> Text:
    need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
    line = f"{gpu['name']}, {gpu['arch']}, {gpu['processors']} processors, {gpu['memory_GB']:.0f} GB: "
    if gpu["fast_path"]:
        return Text(line).append(f"compute capability {need} or newer, Triton runs", style="green")
    return Text(line).append(f"older than compute capability {need}: the torch implementation runs", style="yellow")


def implementations_table(explained: list[dict[str, Any]], title: str) -> Table:
    """What `moesaic.explain` says, one row for each call: the implementation that runs, and why not the others."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("call", ratio=5, overflow="fold")
    table.add_column("runs", no_wrap=True, style="bold green")
    table.add_column("the others", ratio=4, overflow="fold")
    for told in explained:
        others = [f"{n}: {why or 'can run'}" for n, why in told["reasons"].items() if n != told["chosen"]]
        table.add_row(Text(told["problem"]), told["chosen"] or "nothing", Text("\n".join(others), style="dim"))
        table.add_section()
    return table
