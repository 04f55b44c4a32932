"""Compile `Push`'s kernels for a GPU that is not there: one JSON line a kernel. Run without TRITON_INTERPRET."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesaic.parallel import _triton_push as kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(kernel, size: int, hidden: int, meta: bool) -> dict:
    """`kernel` on rank 0 of `size`, as Push launches it for bf16 rows."""
    block = 2048 if hidden % 2048 == 0 else 1024
    constants = dict(L=128 // size, H=hidden, K=8, K_POW2=8, RANK=0, W=size, BLOCK=block, META=meta)
    kinds = dict(x="*bf16", y="*bf16", out="*bf16", back="*bf16", ids="*i32", state="*i32", failed="*i32", w="*fp32",
                 dw="*fp32", back_w="*fp32", out_w="*fp32", xs="*bf16", backs="*bf16", idss="*i32", flags="*i32",
                 ws="*fp32", back_ws="*fp32", tokens="i32", M="i32", spins="i32", stride_x="i32",
                 stride_y="i32")  # fmt: skip
    names, signature, constexprs, attrs = kernel.arg_names, {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        kind = kinds[name.removesuffix("_ptr")]
        if name in ("xs", "idss", "ws", "backs", "back_ws", "flags"):
            signature[name] = (kind,) * size
            attrs |= {(i, j): aligned for j in range(size)}
        else:
            signature[name] = kind
            if kind.startswith("*") or name.startswith("stride"):
                attrs[(i,)] = aligned
    source = ASTSource(kernel, signature, constexprs, attrs)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    ptx = done.asm["ptx"]
    return dict(
        name=kernel.__name__, size=size, hidden=hidden, meta=meta, registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)), wide_stores=len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128", sass)),
        releases=len(re.findall(r"atom\.global\.sys\.release\.exch", ptx)),
        acquires=len(re.findall(r"ld\.global\.sys\.acquire", ptx)),
    )  # fmt: skip


if __name__ == "__main__":
    for size in map(int, sys.argv[1:]):
        for kernel in (kernels.send_kernel, kernels.give_back_kernel, kernels.add_kernel):
            for meta in (True, False):
                print(json.dumps(compile_kernel(kernel, size, 7168, meta)), flush=True)
