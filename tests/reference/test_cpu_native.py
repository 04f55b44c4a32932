"""The native CPU kernels: against the oracle over everything they take, and the keeping of their builds."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic
from moesaic import cases, testing
from moesaic.activations import ACTIVATIONS
from moesaic.errors import Unsupported
from moesaic.ops.fused_experts import _cpu, _cpu_build
from moesaic.routing import Routing

pytestmark = pytest.mark.skipif(_cpu_build.compiler() is None, reason="there is no C compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STAGES = testing.STAGES["fused_experts"]


def layer(H=64, I=48, E=5, K=2, activation="swiglu", layout="concatenated", transposed=False, bias=True):
    return cases.Case("small", H, I, E, K, activation, layout, transposed, bias)


def widened(arguments: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def check(arguments: dict, **more) -> torch.Tensor:
    """The native result, held against the oracle's in fp64."""
    arguments = {**arguments, **more}
    with torch.no_grad():
        out = moesaic.fused_experts(**arguments, implementation="cpu")
        oracle = moesaic.fused_experts(**widened(arguments), implementation="reference")
    longest = max(arguments["x"].shape[1], arguments["w_down"].shape[2], arguments["w_down"].shape[1])
    testing.assert_close(out, oracle, longest, STAGES)
    return out


@pytest.fixture
def level(monkeypatch):
    """`name -> None`: run with the kernels of a lower instruction set, if this CPU has it."""

    def choose(name: str) -> None:
        if not any(name == n for n, _ in _cpu_build.candidates()):
            pytest.skip(f"this CPU has no {name}")
        monkeypatch.setenv("MOESAIC_CPU", name)
        _cpu_build.load.cache_clear()
        assert _cpu_build.load().level == name

    yield choose
    _cpu_build.load.cache_clear()


@pytest.fixture(params=("native products", "torch's products"))
def products(request, monkeypatch):
    """The layer's products by either, whatever its size."""
    monkeypatch.setattr(_cpu, "_torch_products", lambda *_: request.param != "native products")


@pytest.fixture
def native(monkeypatch):
    """No product is torch's, however large: those are as reproducible as torch says."""
    monkeypatch.setattr(_cpu, "_torch_products", lambda *_: False)


def test_the_kernels_are_built_here():
    assert _cpu_build.load().why_not is None
    assert moesaic.ops.fused_experts.OP.implementations.index("cpu") == 1


# ---------------------------------------------------------------- against the oracle
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation, dtype):
    for layout, transposed in (("concatenated", False), ("interleaved", True)):
        inputs = testing.make_inputs(
            layer(64, 48, activation=activation, layout=layout, transposed=transposed), 9, dtype
        )
        check(inputs.arguments())
    constants = ACTIVATIONS[activation].with_constants(alpha=0.7, limit=0.5)
    check(inputs.arguments(), activation=constants)


@pytest.mark.parametrize("name", ("avx512", "avx2", "neon", "generic"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name, dtype, level, native):
    level(name)
    for H, I, layout, transposed in ((63, 37, "concatenated", False), (33, 65, "interleaved", True)):
        case = layer(H, I, layout=layout, transposed=transposed, activation="geglu")
        check(testing.make_inputs(case, 21, dtype).arguments())
        check(testing.make_inputs(case, 1, dtype).arguments())


@pytest.mark.parametrize("pairs", (False, True), ids=("widened", "pairs"))
def test_bf16_without_amx(pairs, monkeypatch, native):
    """Rows widened in registers, and `vdpbf16ps`, which a CPU with AMX never chooses for itself."""
    if pairs and not _cpu_build.load().pairs:
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr(_cpu, "AMX_ROWS", 0)
    monkeypatch.setattr(_cpu, "_pairs", lambda: pairs)
    for H, I, tokens in ((63, 37, 21), (640, 96, 70), (33, 65, 1)):
        check(testing.make_inputs(layer(H, I), tokens, torch.bfloat16).arguments())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(testing.adversarial_ids(5, 2, 19)))
def test_adversarial_routings(name, dtype):
    ids = testing.adversarial_ids(5, 2, 19)[name]
    inputs = testing.make_inputs(layer(40, 33), ids.shape[0], dtype)
    routing = Routing.from_topk(torch.rand(ids.shape), ids, 5)
    check(inputs.arguments(), routing=routing)
    check(inputs.arguments(), routing=routing, residual=torch.randn(inputs.x.shape).to(dtype))


sizes = st.integers(1, 70)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES), H=sizes, I=sizes, E=st.integers(1, 6), K=st.integers(1, 3), T=st.integers(0, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)), layout=st.sampled_from(("concatenated", "interleaved")),
    transposed=st.booleans(), bias=st.booleans(), residual=st.booleans(), threads=st.integers(1, 4),
    strided=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_fuzz(dtype, H, I, E, K, T, activation, layout, transposed, bias, residual, threads, strided, seed):
    g = torch.Generator().manual_seed(seed)
    case = layer(H, I, E, min(K, E), activation, layout, transposed, bias)
    arguments = testing.make_inputs(case, T, dtype, seed=seed).arguments()
    ids = torch.randint(-1, E, (T, K), generator=g)
    arguments["routing"] = Routing.from_topk(torch.randn(T, K, generator=g), ids, E)
    if residual:
        arguments["residual"] = torch.randn(T, H, generator=g).to(dtype)
    if strided:  # every other column, and weights whose memory lies the other way round
        arguments["x"] = arguments["x"].repeat_interleave(2, 1)[:, ::2]
        arguments["w_gate_up"] = arguments["w_gate_up"].mT.contiguous().mT
        arguments["w_down"] = arguments["w_down"].repeat_interleave(2, 2)[:, :, ::2]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(arguments)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_and_long_rows(dtype, products):
    """Several blocks of rows and of columns, and more than one K block."""
    for transposed in (False, True):
        case = layer(304, 272, E=2, K=1, transposed=transposed)
        inputs = testing.make_inputs(case, 300, dtype)
        arguments = inputs.arguments() | {"routing": Routing.from_topk(None, torch.zeros(300, 1).int(), 2)}
        arguments |= {"weights": None, "reduce": "sum"}
        with torch.no_grad():
            out = moesaic.fused_experts(**arguments, implementation="cpu")
            oracle = moesaic.fused_experts(**widened(arguments), implementation="torch")
        testing.assert_close(out, oracle, 304, STAGES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_the_same_bits_whatever_the_number_of_threads(dtype, transposed, native):
    inputs = testing.make_inputs(layer(192, 320, 4, 2, transposed=transposed), 150, dtype)
    outs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                outs.append(moesaic.fused_experts(**inputs.arguments(), implementation="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype, bad, native):
    inputs = testing.make_inputs(layer(48, 40, bias=False), 12, dtype)
    arguments = inputs.arguments()
    with torch.no_grad():
        clean = moesaic.fused_experts(**arguments, implementation="cpu")
        arguments["x"][5, 3] = bad
        out = moesaic.fused_experts(**arguments, implementation="cpu")
    assert not torch.isfinite(out[5]).any()
    keep = torch.arange(12) != 5
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(testing.adversarial_ids(5, 2, 19)))
def test_either_product(name, dtype, products):
    ids = testing.adversarial_ids(5, 2, 19)[name]
    for layout, transposed in (("concatenated", False), ("interleaved", True)):
        inputs = testing.make_inputs(layer(40, 33, layout=layout, transposed=transposed), ids.shape[0], dtype)
        weights = torch.rand(ids.shape)
        arguments = inputs.arguments() | {"routing": Routing.from_topk(weights, ids, 5)}
        check(arguments, residual=torch.randn(inputs.x.shape).to(dtype))
        check_gradients(arguments, weights, "torch")


def test_the_choice_of_products_is_a_function_of_the_problem():
    problem = moesaic.explain("fused_experts", **layer(E=64, K=8).problem(1, torch.float32)).problem
    rows = [_cpu._rows_per_live_expert(problem, T) for T in (0, 1, 64, 512)]
    assert rows[0] == 0 and rows[1] == pytest.approx(1) and 8 < rows[2] < 8.1 and rows[3] == pytest.approx(64)
    assert _cpu._torch_products(torch.float32, 200, False) and not _cpu._torch_products(torch.float32, 64, False)


# ---------------------------------------------------------------- backward
LEAVES = ("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down")


def gradients(arguments: dict, implementation: str, grad: torch.Tensor, needs=LEAVES) -> list[torch.Tensor]:
    arguments = dict(arguments)
    leaves = []
    for name in LEAVES:
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().requires_grad_(name in needs)
            leaves += [arguments[name]] if name in needs else []
    y = moesaic.fused_experts(**arguments, implementation=implementation)
    return list(torch.autograd.grad(y, leaves, grad.to(y.dtype)))


def check_gradients(arguments: dict, weights: torch.Tensor, oracle: str = "reference") -> None:
    arguments = arguments | {"weights": weights}
    x, dtype = arguments["x"], arguments["x"].dtype
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    got = gradients(arguments, "cpu", grad)
    expected = gradients(widened(arguments), oracle, grad.double())
    names = [name for name in LEAVES if arguments[name] is not None]
    longest, stages = 2 * max(*x.shape, arguments["w_down"].shape[2]), testing.STAGES["fused_experts_backward"]
    for name, out, ref in zip(names, got, expected, strict=True):
        assert out.shape == ref.shape
        if name != "weights":
            testing.assert_close(out, ref, longest, stages, dtype, name)
            continue
        # a dot product of I terms, each rounded: one that cancels is near nothing, so only the norm is judged
        assert out.dtype == torch.float32
        assert testing.error_report(out, ref).norm <= testing.bounds(dtype, longest, stages)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients(activation, dtype):
    for layout, transposed in (("concatenated", False), ("interleaved", True)):
        case = layer(33, 49, activation=activation, layout=layout, transposed=transposed)
        inputs = testing.make_inputs(case, 61, dtype)  # an expert with a row or two has columns that cancel to nothing
        ids = testing.adversarial_ids(5, 2, 61)["dropped slots"]
        weights = torch.rand(ids.shape)
        check_gradients(inputs.arguments() | {"routing": Routing.from_topk(weights, ids, 5)}, weights)


@pytest.mark.parametrize("name", ("avx512", "avx2", "neon", "generic"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_every_instruction_set(name, dtype, level):
    level(name)
    inputs = testing.make_inputs(layer(40, 37, bias=False), 19, dtype)
    check_gradients(inputs.arguments(), torch.rand(19, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(testing.adversarial_ids(5, 2, 19)))
def test_gradients_of_adversarial_routings(name, dtype):
    ids = testing.adversarial_ids(5, 2, 19)[name]
    inputs = testing.make_inputs(layer(48, 32), ids.shape[0], dtype)
    weights = torch.rand(ids.shape)
    check_gradients(inputs.arguments() | {"routing": Routing.from_topk(weights, ids, 5)}, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_many_rows(dtype):
    inputs = testing.make_inputs(layer(304, 272, 3, 2), 290, dtype)
    check_gradients(inputs.arguments(), torch.rand(290, 2), "torch")


@pytest.mark.parametrize("needs", [(name,) for name in LEAVES], ids=lambda needs: needs[0])
def test_each_gradient_alone_is_the_same(needs):
    inputs = testing.make_inputs(layer(), 13)
    arguments = inputs.arguments() | {"weights": torch.rand(13, 2)}
    grad = torch.randn(inputs.x.shape)
    every = dict(zip(LEAVES, gradients(arguments, "cpu", grad), strict=True))
    assert torch.equal(gradients(arguments, "cpu", grad, needs)[0], every[needs[0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_same_bits_whatever_the_number_of_threads(dtype):
    inputs = testing.make_inputs(layer(192, 160, 4, 2), 150, dtype)
    arguments = inputs.arguments() | {"weights": torch.rand(150, 2)}
    grad = torch.randn(inputs.x.shape).to(dtype)
    native, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            native.append(gradients(arguments, "cpu", grad, ("w_gate_up", "w_down", "weights")))
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
    for other in native[1:]:
        assert all(torch.equal(a, b) for a, b in zip(native[0], other, strict=True))


# ---------------------------------------------------------------- threads and processes
def test_threads_of_the_program_may_call_at_the_same_time():
    inputs = testing.make_inputs(layer(128, 96, 4, 2), 40)
    with torch.no_grad():
        expected = moesaic.fused_experts(**inputs.arguments(), implementation="cpu")
    outs: list[torch.Tensor] = []

    def call():
        with torch.no_grad():
            outs.extend(moesaic.fused_experts(**inputs.arguments(), implementation="cpu") for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 40 and all(torch.equal(expected, out) for out in outs)


FORK = """
import os, signal, sys, torch, moesaic
from moesaic import cases, testing
torch.set_num_threads(3)
inputs = testing.make_inputs(cases.Case("small", 256, 256, 4, 2), 30)
with torch.no_grad():
    call = lambda: moesaic.fused_experts(**inputs.arguments(), implementation="cpu")
    before = call()
    child = os.fork()
    if not child:
        signal.alarm(30)
        grandchild = os.fork()
        ok = all(torch.equal(before, call()) for _ in range(3))
        if grandchild:
            ok = ok and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if ok else 1)
    assert torch.equal(before, call())
    sys.exit(os.waitpid(child, 0)[1] != 0)
"""


def test_a_forked_child_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


# ---------------------------------------------------------------- builds
@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A build of almost nothing, in a cache of its own: the folder of its source and that of the cache."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    (source / "moe.c").write_text('__attribute__((visibility("default"))) int answer(void) { return 42; }\n')
    monkeypatch.setattr(_cpu_build, "SOURCES", source)
    monkeypatch.setattr(_cpu_build, "FLAGS", ("-shared", "-fPIC"))
    monkeypatch.setenv("MOESAIC_CACHE", str(cache))
    _cpu_build.load.cache_clear()
    yield source, cache
    _cpu_build.load.cache_clear()


def command() -> list[str]:
    found = _cpu_build.compiler()
    assert found is not None
    return found


def test_a_build_is_kept_and_a_damaged_one_made_again(tiny):
    source, _ = tiny
    made = _cpu_build.build(command(), ())
    kept = made.stat().st_mtime_ns
    assert _cpu_build.build(command(), ()) == made and made.stat().st_mtime_ns == kept
    made.write_bytes(made.read_bytes()[:100])
    assert ctypes.CDLL(str(_cpu_build.build(command(), ()))).answer() == 42
    (source / "moe.c").write_text("int answer(void) { return 43; }\n")
    other = _cpu_build.build(command(), ())
    assert other != made and _cpu_build.build(command(), ("-g",)) != other
    assert [p.suffix for p in made.parent.iterdir() if p.is_dir()] == []


BUILD = """
import sys; from pathlib import Path
from moesaic.ops.fused_experts import _cpu_build as b
b.SOURCES = Path(sys.argv[1])
print(b.build(b.compiler(), ()))
"""


def test_processes_that_build_at_the_same_time_make_one_build(tiny):
    source, cache = tiny
    log = cache.parent / "log"
    slow = cache.parent / "cc"
    slow.write_text(f'#!/bin/sh\necho x >> {log}\nsleep 0.3\nexec {command()[0]} "$@"\n')
    slow.chmod(0o755)
    environment = os.environ | {"CC": str(slow)}
    line = [sys.executable, "-c", BUILD, str(source)]
    running = [subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(paths) == 1 and ctypes.CDLL(paths.pop()).answer() == 42
    assert log.read_text().count("x") == 1


def test_without_a_compiler_the_torch_implementation_runs_and_says_why(tiny, monkeypatch):
    monkeypatch.setenv("CC", str(tiny[0] / "nothing"))
    _cpu_build.load.cache_clear()
    problem = moesaic.explain("fused_experts", **layer().problem(4, torch.float32)).problem
    explained = moesaic.ops.fused_experts.OP.explain(problem)
    assert explained.chosen == "torch"
    assert "no C compiler" in dict(explained.reasons)["cpu"]
    assert "no C compiler" in _cpu.status() and "\n" not in _cpu.status()


def test_a_compiler_that_fails_is_quoted_in_one_line(tiny):
    (tiny[0] / "moe.c").write_text("#error the sky is falling\n")
    _cpu_build.load.cache_clear()
    assert "the sky is falling" in _cpu.status() and "\n" not in _cpu.status()


def test_off(tiny, monkeypatch):
    monkeypatch.setenv("MOESAIC_CPU", "off")
    _cpu_build.load.cache_clear()
    problem = moesaic.explain("fused_experts", **layer().problem(4, torch.float32)).problem
    assert "MOESAIC_CPU=off" in str(_cpu.why_not(problem))


def test_what_it_does_not_take_is_refused_by_name():
    inputs = testing.make_inputs(layer(), 4)
    with pytest.raises(Unsupported, match="float64"), torch.no_grad():
        moesaic.fused_experts(**widened(inputs.arguments()), implementation="cpu")


def test_sources_are_in_the_package():
    names = {path.name for path in (Path(moesaic.__file__).parent / "ops/fused_experts/cpu").iterdir()}
    assert {"moe.c", "vec.h", "act.h", "dot.h", "outer.h", "amx.h", "pool.h", "layer.h", "up.h", "down.h"} <= names
