"""Compile the shipped kernels for GPUs that are not there, and report what the compiler made of them.

Run as a script without TRITON_INTERPRET: `python aot.py sm_80 sm_90 gfx942` prints one JSON line a kernel.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from moesaic import hardware
from moesaic.activations import ACTIVATIONS
from moesaic.cases import CASES
from moesaic.launch import Launch, can_overlap, pow2
from moesaic.ops.fused_experts import _triton as experts
from moesaic.ops.grouped_matmul import _triton as products
from moesaic.ops.grouped_matmul._configs import TALL, TILES, WIDE, Product, gemm_config
from moesaic.ops.grouped_matmul._tiles import tiles_launch
from moesaic.ops.permute import _triton as permute
from moesaic.ops.route import RouterConfig
from moesaic.ops.route import _triton as route

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTER = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_kernel(kernel, arch: str, types: dict[str, str], constants: dict, num_warps: int, num_stages: int) -> dict:
    """Compile one kernel; `types` are its run-time arguments (pointers 16-byte aligned), `constants` all others."""
    names = kernel.arg_names
    if "OVERLAP" in names:  # as `Launch` gives it
        constants = constants | {"OVERLAP": can_overlap(arch)}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    constexprs = {(names.index(n),): v for n, v in constants.items()}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")}
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    strides = [n for n in types if n.startswith("stride_") and n not in plain]
    attrs |= {(names.index(n),): [["tt.divisibility", 16]] for n in strides}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    done = triton.compile(source, target=target(arch), options={"num_warps": num_warps, "num_stages": num_stages})
    return nvidia_report(done, kernel.is_gluon()) if arch.startswith("sm_") else amd_report(done)


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


def config_of(arch: str, case, rows: float, *, up: bool, dgrad: bool, dtype=torch.bfloat16):
    E, H, I = case.num_experts, case.hidden_size, case.intermediate_size
    width = ACTIVATIONS[case.activation].width(I) if up and not dgrad else I if up else H
    R, (N, K) = round(rows * E), (I, H) if up else (H, I)
    return gemm_config(arch, dtype, Product(R, E, width, K, N, R // case.top_k if up else 0))


def gemm(arch: str, case, rows: float, *, up: bool, training: bool = False, dgrad: bool = False, dtype=torch.bfloat16):
    """The arguments of one product of a layer, as `products.gemm` would launch it."""
    act = ACTIVATIONS[case.activation]
    H, I = case.hidden_size, case.intermediate_size
    N, K = (I, H) if up else (H, I)
    config = config_of(arch, case, rows, up=up, dgrad=dgrad, dtype=dtype).plain
    flip = case.transposed != dgrad
    types = {"x_ptr": POINTER[dtype], "w_ptr": POINTER[dtype], "out_ptr": POINTER[dtype], "offsets_ptr": "*i32",
             "stride_xm": "i32", "stride_we": "i32", "R": "i32", "num_slots": "i32"}  # fmt: skip
    constants = {
        "gather_ptr": None, "bias_ptr": None, "hidden_ptr": None, "N": N, "K": K, "E": case.num_experts,
        "E_POW2": pow2(case.num_experts), "GATHER": 0, "ACTIVATION": products.epilogue(None, False)[0], "GATED": False,
        "INTERLEAVED": case.layout == "interleaved", "ALPHA": act.alpha, "LIMIT": act.limit, "HAS_BIAS": case.bias,
        "SAVE_HIDDEN": training and up, "ZERO_TAIL": False, "BY_ROW": rows <= 16, "PRECISION": "ieee",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    unit, other = ("stride_wn", "stride_wk") if flip else ("stride_wk", "stride_wn")
    constants[unit], types[other] = 1, "i32"
    if up and not dgrad:
        constants |= {"ACTIVATION": act.device[0], "GATED": act.gated}
    if up or dgrad:
        constants["GATHER"] = case.top_k
        types["gather_ptr"] = constants.pop("gather_ptr") or "*i32"
    if case.bias:
        types["bias_ptr"] = constants.pop("bias_ptr") or POINTER[dtype]
    if constants["SAVE_HIDDEN"]:
        types["hidden_ptr"] = constants.pop("hidden_ptr") or POINTER[dtype]
    return products._grouped_gemm_kernel, types, constants, config.num_warps, config.num_stages


def tensor_map(*box: int, dtype=torch.bfloat16) -> str:
    return f"tensordesc<{POINTER[dtype][1:]}[{', '.join(map(str, box))}]>"


def persistent(c, case, *, up: bool, training: bool = False, dgrad: bool = False):
    """The same of the persistent kernel, with configuration c."""
    act = ACTIVATIONS[case.activation] if up and not dgrad else None
    H, I = case.hidden_size, case.intermediate_size
    N, K = (I, H) if up else (H, I)
    gated = act is not None and act.gated
    interleaved = case.layout == "interleaved"
    joined, transposed = gated and not interleaved, case.transposed != dgrad
    m, n, k = c.block_m, c.block_n, c.block_k
    types = {"table_ptr": "*i32", "x": "*bf16", "stride_xm": "i32"}
    if joined:
        types["w_desc"] = tensor_map(1, k, 2, n // 2) if transposed else tensor_map(1, 2, n // 2, k)
    else:
        types["w_desc"] = tensor_map(1, k, n) if transposed else tensor_map(1, n, k)
    types["out_desc"] = tensor_map(1, 1, m, n // 2)
    constants = {
        "N": N, "K": K, "GATHER": case.top_k if up or dgrad else 0, "TRANSPOSED": transposed, "HAS_BIAS": case.bias,
        "SAVE_HIDDEN": training and up, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PROGRAMS": 132,
    }  # fmt: skip
    epilogue = products.epilogue(act and (act.name, act.alpha, act.limit), interleaved)
    constants |= dict(zip(("ACTIVATION", "GATED", "INTERLEAVED", "ALPHA", "LIMIT"), epilogue, strict=True))
    if constants["GATHER"]:
        types["gather_ptr"] = "*i32"
    else:
        types["x"] = tensor_map(1, 1, m, k)
    if constants["SAVE_HIDDEN"]:
        types |= dict.fromkeys(("hidden_desc", "up_desc") if joined else ("hidden_desc",), tensor_map(1, 1, m, n // 2))
    if case.bias:
        types["bias_ptr"] = "*bf16"
    kernel = products._triton_tma._persistent_gemm_kernel
    constants |= dict.fromkeys(set(kernel.arg_names) - set(types) - set(constants))
    return kernel, types, constants, c.num_warps, c.num_stages


def swapped(c, case, *, up: bool, sorts: bool = False, dgrad: bool = False):
    """The same of the swapped kernel; `sorts` where rows were sorted before."""
    act = ACTIVATIONS[case.activation] if up and not dgrad else None
    N, K = (case.intermediate_size, case.hidden_size) if up else (case.hidden_size, case.intermediate_size)
    gated = act is not None and act.gated
    transposed, gathered = case.transposed != dgrad, (up or dgrad) and not sorts
    rows = 16384 // c.block_m
    columns = min(64, rows // 2 if gated else rows)

    def box(*shape: int) -> str:
        layout = hardware.gl.NVMMASharedLayout.get_default_for(list(shape), hardware.gl.bfloat16)
        return f"{tensor_map(*shape)[:-1]},{layout!r}>"

    types = {"table_ptr": "*i32", "x": "*bf16", "stride_x": "i32"}
    types["out_desc"] = box(1, 1, 2048 // columns, columns)
    if transposed or not gated:
        types["w_desc"] = box(1, 64, rows) if transposed else box(1, rows, 64)
    else:
        types["w_desc"] = box(1, rows // 16, 2, 8, 64)
    if gathered:
        types["gather_ptr"] = "*i32"
    else:
        types["x"] = box(1, 1, 32, 64)
    if case.bias:
        types["bias_ptr"] = "*bf16"
    constants = {
        "N": N, "K": K, "TOP_K": case.top_k if gathered else 0, "TRANSPOSED": transposed, "HAS_BIAS": case.bias,
        "MAIN": c.block_m, "ROWS": rows, "PROGRAMS": 132,
    }  # fmt: skip
    interleaved = case.layout == "interleaved"
    epilogue = products.epilogue(act and (act.name, act.alpha, act.limit), interleaved)
    constants |= dict(zip(("ACTIVATION", "GATED", "INTERLEAVED", "ALPHA", "LIMIT"), epilogue, strict=True))
    kernel = importlib.import_module("moesaic.ops.grouped_matmul._gluon")._swapped_gemm_kernel
    constants |= dict.fromkeys(set(kernel.arg_names) - set(types) - set(constants))
    return kernel, types, constants, 4, 4


def swapped_kernels():
    """One of each kind: tall tiles gather rows, wide ones find them sorted."""
    qwen, gpt, nemotron, gemma = (CASES[n] for n in ("qwen3-30b-a3b", "gpt-oss-120b", "nemotron-h", "gemma4-26b"))
    for case in (qwen, gpt, nemotron, gemma):
        yield f"tall up, {case.name}", swapped(TALL, case, up=True)
    for case in (qwen, gpt):
        yield f"wide up, {case.name}", swapped(WIDE, case, up=True, sorts=True)
        yield f"tall down, {case.name}", swapped(TALL, case, up=False)
        yield f"wide down, {case.name}", swapped(WIDE, case, up=False)
        yield f"tall dgrad of down, {case.name}", swapped(TALL, case, up=True, dgrad=True)
    yield "tall up, interleaved", swapped(TALL, replace(gpt, transposed=False), up=True)


def wgrad(arch: str, case, dtype=torch.bfloat16):
    p, i32 = POINTER[dtype], "i32"
    block_n, block_k, block_r, warps, stages = products.wgrad_config(arch, dtype)
    types = {"left_ptr": p, "right_ptr": p, "right_gather_ptr": "*i32", "out_ptr": p, "offsets_ptr": "*i32",
             "stride_left": i32, "stride_right": i32, "stride_oe": i32, "stride_on": i32}  # fmt: skip
    constants = {"left_gather_ptr": None, "stride_ok": 1, "N": 2 * case.intermediate_size, "K": case.hidden_size,
                 "LEFT_GATHER": 0, "RIGHT_GATHER": case.top_k, "PRECISION": "ieee",
                 "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": block_r}  # fmt: skip
    return products._grouped_wgrad_kernel, types, constants, warps, stages


def small_kernels(case, dtype=torch.bfloat16):
    """Kernels without a product: combine, activation backward, router, index."""
    p, f, i = POINTER[dtype], "*fp32", "*i32"
    act, E, K, H, I = (
        ACTIVATIONS[case.activation],
        case.num_experts,
        case.top_k,
        case.hidden_size,
        case.intermediate_size,
    )
    forward, backward = act.device
    combine = {"rows_ptr": p, "row_index_ptr": i, "weights_ptr": f, "out_ptr": p, "stride_rows": "i32"}
    sizes = {"H": H, "TOP_K": K, "WEIGHTED": True, "BLOCK": 1024}
    for residual in (False, True):
        more = {"stride_residual": "i32"} | ({"residual_ptr": p} if residual else {})
        absent = {} if residual else {"residual_ptr": None}
        yield (
            "combine" + ", residual" * residual, permute._combine_kernel, combine | more,
            sizes | absent | {"RESIDUAL": residual},
        )  # fmt: skip
    yield "activation backward", experts._activation_backward_kernel, {"da_ptr": p, "hidden_ptr": p, "weights_ptr": f,
        "grad_ptr": p, "row_order_ptr": i, "offsets_ptr": i, "dh_ptr": p, "scaled_ptr": p, "dweights_ptr": f,
        "stride_grad": "i32"}, {"b_down_ptr": None, "H": H, "I": I, "E": E, "E_POW2": pow2(E), "TOP_K": K,
        "FORWARD": forward, "BACKWARD": backward, "GATED": act.gated, "INTERLEAVED": False, "ALPHA": act.alpha,
        "LIMIT": act.limit, "WEIGHTED": True, "HAS_BIAS": False, "BLOCK": 1024}  # fmt: skip


def of_launch(launch: Launch, types: dict[str, str]):
    """Compile arguments of a launch; `types` names those of its pointers that are not None, and its numbers."""
    names, constants = [n for n in launch.kernel.arg_names if n != "OVERLAP"], launch.constants
    given = dict(zip(names[-len(constants) :], constants, strict=True))
    missing = [n for n in names[: -len(constants)] if n not in types]
    return launch.kernel, types, given | dict.fromkeys(missing), launch.options["num_warps"], 2


def router_kernels():
    """One token, one range, many ranges; plain, grouped, ragged, given ids, statistics; the backward."""
    deepseek = RouterConfig(8, "sigmoid", norm_eps=1e-20, scale=2.5, num_groups=8, topk_groups=4)
    configs = {
        "softmax": (RouterConfig(8), 128), "grouped sigmoid": (deepseek, 256), "wide": (RouterConfig(16), 896),
        "top-p": (RouterConfig(8, policy="top_p", threshold=0.8), 60),
        "sqrt_softplus": (RouterConfig(6, "sqrt_softplus", norm_eps=1e-20, soft_cap=30.0), 256),
    }  # fmt: skip
    f, i, n = "*fp32", "*i32", "i32"
    ends = {"tokens_ptr": i, "offsets_ptr": i, "order_ptr": i, "index_ptr": i}
    middle = {"places_ptr": i, "counts_ptr": i}
    for name, (config, E) in configs.items():
        sums = {"sums_ptr": f, "squares_ptr": f}
        numbers = {"stride_t": n, "per_sequence": n, "ranges": n, "per_range": n}
        for T, statistics in ((1, False), (64, False), (32768, False), (4096, True)):
            dtypes = (torch.float32, torch.float32)
            launch, cut, _ = route._route_launch(dtypes, T, E, config.top_k, E, 1, statistics, config)
            types = {"logits_ptr": f, "bias_ptr": f, "weights_ptr": f, "ids_ptr": i, **ends, **numbers}
            types |= (sums if statistics else {}) | ({} if cut.single else middle)
            yield f"route {name}, T = {T}{', statistics' * statistics}", of_launch(launch, types)
        dtypes = (torch.float32, torch.int32)
        launch, cut = route._weigh_launch(dtypes, 4096, E, config.top_k, E, 1, True, config)
        types = {"logits_ptr": f, "given_ptr": i, "weights_ptr": f, "ids_ptr": i, "counts_ptr": i, **sums, **numbers}
        yield f"weigh given ids {name}", of_launch(launch, types)
        types = {"grad_ptr": f, "logits_ptr": f, "ids_ptr": i, "out_ptr": f, "stride_t": n, "T": n, "per_sequence": n}
        for statistics in (False, True):
            more = {"grad_sums_ptr": f, "grad_squares_ptr": f} if statistics else {}
            launch, sparse = route._backward_launch((torch.float32,) * 2, 4096, E, config.top_k, E, statistics, config)
            names = {k: v for k, v in types.items() if not sparse or k != "per_sequence"}
            yield f"route backward {name}{', statistics' * statistics}", of_launch(launch, names | more)
    bf16 = {"x_ptr": "*bf16", "w_ptr": "*bf16", "partial_ptr": f, "arrived_ptr": i, "logits_ptr": f, "bias_ptr": f}
    for name, E, H in (("softmax", 128, 2048), ("grouped sigmoid", 256, 7168)):
        dtypes = (torch.bfloat16, None, torch.float32)
        launch, _, _ = route._gate_launch(dtypes, 16, E, H, H, H, configs[name][0])
        types = {**bf16, "weights_ptr": f, "ids_ptr": i, **ends, "stride_x": n, "stride_w": n, "T": n}
        yield f"gate and route {name}", of_launch(launch, types)
    for total in (64, 262144):
        launch, cut = route._count_launch(torch.int32, total, 256)
        types = {"given_ptr": i, "ids_ptr": i, **ends, "total": n, "per_range": n} | ({} if cut.single else middle)
        yield f"count, {total} slots", of_launch(launch, types)
    types = {"ids_ptr": i, **middle, **ends, "per_sequence": n, "ranges": n, "per_range": n, "programs": n}
    yield "index", of_launch(route._index_launch(256, cut), types)


def jobs(arch: str):
    """`(name, needs tensor cores, compile arguments)` of everything that is compiled for an architecture."""
    qwen, gpt, nemotron = (CASES[n] for n in ("qwen3-30b-a3b", "gpt-oss-120b", "nemotron-h"))
    for rows in (1, 24, 48, 256):
        for up in (True, False):
            tile = config_of(arch, qwen, rows, up=up, dgrad=False).block_m
            name = f"{'up' if up else 'down'}, {rows} rows an expert, {tile} a tile"
            yield name, True, gemm(arch, qwen, rows, up=up)
    yield "up, training", True, gemm(arch, qwen, 256, up=True, training=True)
    yield "up, not gated", True, gemm(arch, nemotron, 256, up=True)
    for rows in (1, 256):
        tile = config_of(arch, gpt, rows, up=True, dgrad=False).block_m
        yield f"up, transposed interleaved biased, {tile} a tile", True, gemm(arch, gpt, rows, up=True)
    yield "dgrad of down", True, gemm(arch, qwen, 256, up=True, dgrad=True)
    if arch == "sm_90":
        scout = CASES["llama4-scout"]
        for c in (c for c in TILES.values() if c.kernel == "persistent"):
            name = f"persistent {c.block_m}x{c.block_n}"
            for case in (qwen, gpt, nemotron, scout):
                yield f"{name} up, {case.name}", True, persistent(c, case, up=True)
            for case in (qwen, gpt):
                yield f"{name} up, training, {case.name}", True, persistent(c, case, up=True, training=True)
                yield f"{name} down, {case.name}", True, persistent(c, case, up=False)
            yield f"{name} dgrad of down, {qwen.name}", True, persistent(c, qwen, up=True, dgrad=True)
        if hardware.has_gluon():
            yield from ((name, True, arguments) for name, arguments in swapped_kernels())
        tables = {"offsets_ptr": "*i32", "first_ptr": "*i32"}
        yield "tile table", False, of_launch(tiles_launch(128, (128, 6, 16, 0)), tables)
        two = tiles_launch(128, (128, 6, 16, 32), (256, 16, 16, 32))
        yield "two tile tables", False, of_launch(two, tables | {"second_ptr": "*i32"})
    yield "up, fp32", False, gemm(arch, qwen, 256, up=True, dtype=torch.float32)
    yield "wgrad", True, wgrad(arch, qwen)
    yield "wgrad, fp32", False, wgrad(arch, qwen, torch.float32)
    for name, kernel, types, constants in small_kernels(CASES["deepseek-v3"]):
        yield name, False, (kernel, types, constants, 4, 2)
    if arch in ("sm_80", "sm_90", "gfx942"):  # one of each kind: nothing in the router is made for more
        for name, arguments in router_kernels():
            yield name, False, arguments


def main() -> None:
    for arch in sys.argv[1:]:
        for name, needs, arguments in jobs(arch):
            kernel, *rest = arguments
            print(
                json.dumps({"arch": arch, "name": name, "needs": needs, **compile_kernel(kernel, arch, *rest)}),
                flush=True,
            )


if __name__ == "__main__":
    main()
