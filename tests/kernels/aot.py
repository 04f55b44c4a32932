"""Compile the shipped kernels for GPUs that are not there, and report what the compiler made of them.

Run as a script without TRITON_INTERPRET: `python aot.py sm_80 sm_90 gfx942` prints one JSON line a kernel. What is
compiled is what the operators themselves would launch: they run dry, on tensors without memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from moesaic import hardware
from moesaic.activations import ACTIVATIONS
from moesaic.cases import CASES, Case
from moesaic.launch import can_overlap
from moesaic.launcher import Request, dry
from moesaic.ops import fused_experts as layer
from moesaic.ops import index as indexing
from moesaic.ops import permute as moving
from moesaic.ops import route as routing
from moesaic.ops.fused_experts import _triton as experts
from moesaic.ops.gate import _triton as gate
from moesaic.ops.grouped_matmul import gpu
from moesaic.ops.grouped_matmul.gpu.schedule import TileTable
from moesaic.ops.grouped_matmul.gpu.spec import GemmSpec
from moesaic.ops.index import _triton as index
from moesaic.ops.permute import _triton as permute
from moesaic.ops.route import RouterConfig
from moesaic.ops.route import _triton as route

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
Job = tuple[str, bool, Request]  # name, needs tensor cores, what is compiled


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def source(request: Request, arch: str) -> Any:
    """What Triton would compile of a launch: pointers begin at 16 bytes, strides are looked at, counts are not."""
    kernel, bound = request.bound.kernel, request.bound
    names = [n for n in kernel.function.arg_names]
    signature: dict[str, str] = {}
    constants = dict(zip(kernel.constants, bound.constants, strict=True))
    if kernel.overlaps:
        constants["OVERLAP"] = can_overlap(arch)
    divisible: list[str] = []
    maps = {place: tensor_map for _, place, tensor_map, _ in bound._maps}
    for place, (name, dtype) in enumerate(zip(kernel.arguments, request.dtypes, strict=False)):
        if dtype is None:
            constants[name] = None
        elif place in maps:
            shape = ", ".join(map(str, maps[place].box))
            layout = ""
            if maps[place].gluon:
                element = hardware.gl.bfloat16 if dtype == torch.bfloat16 else hardware.gl.float16
                layout = f",{hardware.gl.NVMMASharedLayout.get_default_for(list(maps[place].box), element)!r}"
            signature[name] = f"tensordesc<{TYPES[dtype]}[{shape}]{layout}>"
        else:
            signature[name] = f"*{TYPES[dtype]}"
            divisible.append(name)
    numbers = zip(kernel.arguments[len(request.dtypes) :], (*request.strides, *request.counts), strict=True)
    for name, value in numbers:
        looked_at = name not in kernel.counts
        if looked_at and value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            divisible += [name] * (looked_at and value % 16 == 0)
    signature |= dict.fromkeys(constants, "constexpr")
    made = GluonASTSource if kernel.function.is_gluon() else ASTSource
    constexprs = {(names.index(n),): v for n, v in constants.items()}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    return made(kernel.function, {n: signature[n] for n in names}, constexprs, attrs)


def compile_kernel(request: Request, arch: str) -> dict[str, Any]:
    done = triton.compile(source(request, arch), target=target(arch), options=request.bound.options)
    gluon = request.bound.kernel.function.is_gluon()
    return nvidia_report(done, gluon) if arch.startswith("sm_") else amd_report(done)


def barrier_addresses(ptx: str) -> list[int]:
    """Where in shared memory barriers are made: `global_smem` and the constants added to it."""
    offsets = dict.fromkeys(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx), 0)
    for into, base, constant in re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", ptx):
        if base in offsets:
            offsets.setdefault(into, offsets[base] + int(constant))
    found = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[\s*(%r\d+)\s*(?:\+\s*(\d+))?\s*\]", ptx)
    return sorted(offsets.get(register, -(10**9)) + int(constant or 0) for register, constant in found)


def nvidia_report(done, barriers: bool) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "shared": done.metadata.shared,
        "spills": len(re.findall(r"\bSTL\b", sass)) + len(re.findall(r"\bLDL\b", sass)),
        "tensor_core": {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "UTCHMMA")},
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "barriers": barrier_addresses(done.asm["ptx"]) if barriers else [],
    }


def amd_report(done) -> dict:
    text = done.asm["amdgcn"]
    spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
    scratch = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)),
        "shared": done.metadata.shared,
        "spills": sum(map(int, spilled)) + sum(map(int, scratch)),
        "tensor_core": {"v_mfma": len(re.findall(r"v_mfma_", text))},
        "async_copies": 0,
    }


def requests(call: Any, *arguments: Any) -> Iterator[Request]:
    with dry() as pending:
        call(*arguments)
    yield from pending.requests.values()


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gpu_of(arch: str) -> hardware.Gpu:
    return hardware.gpu_named("", arch)


# ---------------------------------------------------------------- products
def up_spec(arch: str, case: Case, training: bool = False, dtype: torch.dtype = torch.bfloat16) -> GemmSpec:
    return experts._contiguous(problem_of(arch, case, dtype, training))[0]


def down_spec(arch: str, case: Case, dtype: torch.dtype = torch.bfloat16) -> GemmSpec:
    return experts._contiguous(problem_of(arch, case, dtype))[1]


def dgrad_spec(arch: str, case: Case) -> GemmSpec:
    """Of the down product, which gathers the gradient's rows."""
    H, I = case.hidden_size, case.intermediate_size
    w = (H * I, I, 1) if case.transposed else (H * I, 1, I)
    return GemmSpec(gpu_of(arch), torch.bfloat16, case.num_experts, I, H, (H, *w), top_k=case.top_k)


def problem_of(
    arch: str, case: Case, dtype: torch.dtype = torch.bfloat16, training: bool = False, tokens: int = 64
) -> Any:
    return layer.FusedExpertsProblem(
        "cuda", gpu_of(arch), dtype, tokens, case.top_k, case.num_experts, case.hidden_size, case.intermediate_size,
        case.bias, case.activation, ACTIVATIONS[case.activation].alpha, ACTIVATIONS[case.activation].limit,
        case.layout == "interleaved", case.transposed, training,
    )  # fmt: skip


def product(spec: GemmSpec, choice: gpu.Choice) -> Request:
    """What one way to make a product launches, beside its tile table."""
    gemm, rows = gpu.make(spec, choice), 4096
    sources = rows // spec.top_k if spec.top_k and not choice.sorts else rows
    x, w = empty(sources, spec.K, dtype=spec.dtype), empty(spec.experts, 1, 1, dtype=spec.dtype)
    table = TileTable(empty(spec.experts + 1, dtype=torch.int32), rows)
    order = empty(rows, dtype=torch.int32) if gemm.spec.top_k or spec.epilogue.scaled else None
    bias = empty(spec.experts, spec.width, dtype=spec.dtype) if spec.epilogue.bias else None
    preact = empty(rows, spec.width, dtype=spec.dtype) if spec.epilogue.preact else None
    scale = empty(rows, dtype=torch.float32) if spec.epilogue.scaled else None
    made = requests(gemm, x, w, table, order, bias, preact, scale)
    return next(r for r in made if "gemm" in r.bound.kernel.name)


def products(arch: str) -> Iterator[Job]:
    """Every kernel with every tile that may be chosen, for what models ask of it."""
    qwen, gpt, nemotron, gemma, scout = (
        CASES[n] for n in ("qwen3-30b-a3b", "gpt-oss-120b", "nemotron-h", "gemma4-26b", "llama4-scout")
    )
    specs = {f"up, {c.name}": up_spec(arch, c) for c in (qwen, gpt, nemotron, gemma, scout)}
    specs |= {f"up, training, {c.name}": up_spec(arch, c, training=True) for c in (qwen, gpt, nemotron)}
    specs |= {f"down, {c.name}": down_spec(arch, c) for c in (qwen, gpt)}
    specs |= {f"down, fp16, {c.name}": down_spec(arch, c, torch.float16) for c in (qwen, gpt)}
    specs |= {f"dgrad of down, {c.name}": dgrad_spec(arch, c) for c in (qwen, gpt)}
    specs["up, K-major interleaved, gpt-oss-120b"] = up_spec(arch, replace(gpt, transposed=False))
    specs["up, fp32"] = up_spec(arch, qwen, dtype=torch.float32)
    seen = set()
    for name, spec in specs.items():
        for rows in (1, 24, 48, 256):  # an expert
            for choice in gpu.ways(spec.of(rows * spec.experts), sorts=spec.epilogue.gated):
                request = product(spec, choice)
                if (request.bound, request.dtypes) not in seen and may_run(name, choice):
                    seen.add((request.bound, request.dtypes))
                    yield f"{name}, {choice}", spec.half, request


def may_run(name: str, choice: gpu.Choice) -> bool:
    """Compiling takes a second or two: of what differs in one thing only, one is enough."""
    qwen = "qwen3-30b" in name
    if choice.kernel == "pointer":
        return not choice.sorts and "fp16" not in name and (qwen or "fp32" in name or name == "up, gpt-oss-120b")
    if choice.kernel == "persistent_tma":
        return (qwen and "training" not in name) or (choice.config.block_m == 128 and not choice.sorts)
    return True


def layer_kernels(arch: str, case: Case) -> Iterator[Job]:
    """What a layer launches forward and backward beside its forward products."""
    T, E, H, I, K = 64, case.num_experts, case.hidden_size, case.intermediate_size, case.top_k
    N, i32, f32 = ACTIVATIONS[case.activation].width(I), torch.int32, torch.float32
    up, down = ((E, H, N), (E, I, H)) if case.transposed else ((E, N, H), (E, H, I))
    bias = (empty(E, N), empty(E, H)) if case.bias else (None, None)
    tables = empty(T * K, dtype=i32), empty(T * K, dtype=i32), empty(E + 1, dtype=i32)
    weights = empty(T, K, dtype=f32)
    for residual in (None, empty(T, H)):
        o = layer.Operands(empty(T, H), empty(*up), empty(*down), weights, *bias, residual, *tables)
        for request in requests(experts.forward, o, problem_of(arch, case)):
            if "gemm" not in request.bound.kernel.name:
                yield f"{request.bound.kernel.name}{', residual' * (residual is not None)}", False, request
    needs = layer.Operands(*[True] * 4, *[case.bias] * 2, *[False] * 4)
    saved = layer.Saved(empty(T * K, N))
    arguments = layer.Outputs(empty(T, H)), o, saved, problem_of(arch, case, training=True), needs
    for n, request in enumerate(requests(experts.backward, *arguments)):
        yield f"backward {n}, {request.bound.kernel.name}, {case.name}", "gemm" in request.bound.kernel.name, request
    options = moving.PermuteProblem("cuda", gpu_of(arch), torch.bfloat16, H, K)
    yield from (("permute", False, r) for r in requests(permute.permute, moving.PermuteOperands(o.x, *tables), options))
    o = moving.UnpermuteOperands(empty(T * K, H), weights, *tables)
    arguments = moving.Sums(empty(T, H)), o, None, options, None
    yield from (("unpermute backward", False, r) for r in requests(permute.unpermute_backward, *arguments))


# ---------------------------------------------------------------- routing
def router_kernels() -> Iterator[Job]:
    """One token, one range, many ranges; plain, grouped, ragged, given ids, statistics; the backward; the gate."""
    deepseek = RouterConfig(8, "sigmoid", norm_eps=1e-20, scale=2.5, num_groups=8, topk_groups=4)
    configs = {
        "softmax": (RouterConfig(8), 128), "grouped sigmoid": (deepseek, 256), "wide": (RouterConfig(16), 896),
        "top-p": (RouterConfig(8, policy="top_p", threshold=0.8), 60),
        "sqrt_softplus": (RouterConfig(6, "sqrt_softplus", norm_eps=1e-20, soft_cap=30.0), 256),
    }  # fmt: skip
    f32, i32 = torch.float32, torch.int32
    for name, (config, E) in configs.items():
        K, bias = config.top_k, empty(E, dtype=f32)
        for T, statistics in ((1, False), (64, False), (32768, False), (4096, True)):
            problem = routing.RouteProblem(columns=E, num_experts=E, config=config, statistics=statistics)
            made = requests(route.forward, routing.Operands(empty(T, E, dtype=f32), bias, None), problem)
            yield from ((f"{r.bound.kernel.name} {name}, T = {T}", False, r) for r in made)
        ids = empty(4096, K, dtype=i32)
        problem = routing.RouteProblem(columns=E, num_experts=E, config=config, statistics=True)
        o = routing.Operands(empty(4096, E, dtype=f32), None, ids)
        made = requests(route.forward, o, problem)
        yield from ((f"{r.bound.kernel.name} {name}, given ids", False, r) for r in made)
        for sums in (None, empty(1, E, dtype=f32)):
            grads = routing.Outputs(empty(4096, K, dtype=f32), *[None] * 5, sums, None, None)
            made = requests(route.backward, grads, o, routing.Saved(ids), problem, None)
            yield from ((f"{r.bound.kernel.name} {name}", False, r) for r in made)
    for name, E, H in (("softmax", 128, 2048), ("grouped sigmoid", 256, 7168)):
        made = requests(gate.route_few, empty(16, H), empty(E, H), None, empty(E, dtype=f32), configs[name][0])
        yield from ((f"gate and route {name}", False, r) for r in made)
    for total in (64, 262144):
        problem = indexing.ExpertIndexProblem(num_experts=256)
        made = requests(index.forward, indexing.Operands(empty(total, 1, dtype=i32)), problem)
        yield from ((f"{r.bound.kernel.name}, {total} slots", False, r) for r in made)


def jobs(arch: str) -> Iterator[Job]:
    """Everything that is compiled for an architecture."""
    yield from products(arch)
    yield from layer_kernels(arch, CASES["qwen3-30b-a3b"])
    yield from layer_kernels(arch, CASES["gpt-oss-120b"])
    if arch in ("sm_80", "sm_90", "gfx942"):  # one of each kind: nothing in the router is made for more
        seen: set[Any] = set()
        for name, needs, request in router_kernels():
            if (request.bound, request.dtypes) not in seen:
                seen.add((request.bound, request.dtypes))
                yield name, needs, request


def main() -> None:
    for arch in sys.argv[1:]:
        for name, needs, request in jobs(arch):
            print(json.dumps({"arch": arch, "name": name, "needs": needs, **compile_kernel(request, arch)}), flush=True)


if __name__ == "__main__":
    main()
