"""Launching: what tells compiled variants apart, what is private to Triton, and compiling together."""

from __future__ import annotations

import pytest
import torch

from moesaic import hardware, launcher

if not hardware.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)

from moesaic.hardware import tl, triton
from moesaic.launch import Kernel, aligned


@triton.jit(do_not_specialize=["count"])
def _add(x_ptr, y_ptr, out_ptr, stride, count, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < count, other=0.0)
    if HAS_Y:
        x += tl.load(y_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr + i, x, mask=i < count)


add = Kernel(_add)


def test_a_kernel_reads_its_signature():
    assert add.constants == ["HAS_Y", "BLOCK"] and not add.overlaps
    assert add.arguments == ["x_ptr", "y_ptr", "out_ptr", "stride", "count"]
    with pytest.raises(TypeError, match="BLOCK"):
        add.bind(HAS_Y=True)
    with pytest.raises(TypeError, match="SIZE"):
        add.bind(HAS_Y=True, BLOCK=16, SIZE=3)
    assert add.bind(HAS_Y=True, BLOCK=16) is add.bind(BLOCK=16, HAS_Y=True), "bound once"
    assert add.bind(HAS_Y=True, BLOCK=16) is not add.bind(HAS_Y=True, BLOCK=16, num_warps=8)


def test_requests_hang_on_what_is_compiled(device):
    """Dtypes, absent pointers and strides make another variant; counts and grids do not."""
    bound = add.bind(HAS_Y=False, BLOCK=16)
    x, half = torch.zeros(64, device=device), torch.zeros(64, dtype=torch.float16, device=device)
    with launcher.dry() as pending:
        for count in (1, 7, 16, 64):
            bound((count, 1, 1), (x, None, x), (1,), (count,))
        assert len(pending.requests) == 1
        bound((1, 1, 1), (half, None, x), (1,), (8,))
        bound((1, 1, 1), (x, x, x), (1,), (8,))
        bound((1, 1, 1), (x, None, x), (2,), (8,))
    assert len(pending.requests) == 4


def test_nothing_runs_while_dry(device):
    out = torch.full((16,), 7.0, device=device)
    with launcher.dry():
        add.bind(HAS_Y=False, BLOCK=16)((1, 1, 1), (torch.ones(16, device=device), None, out), (1,), (16,))
    assert (out == 7).all()


def test_a_launch(device):
    """Cold, warm, and with operands that begin anywhere."""
    if hardware.triton_why_not(device, hardware.arch_of(torch.device(device))):
        pytest.skip("needs Triton")
    whole = torch.arange(65.0, device=device)
    for x in (whole[:64], whole[1:]):
        for _ in range(3):
            out = torch.zeros(32, device=device)
            launcher.together(add.bind(HAS_Y=True, BLOCK=16), (2, 1, 1), (x, x.clone(), out), (2,), (32,))
            want = x[::2] + x[:32]
            assert torch.equal(out, want)


def test_aligned_copies_keep_strides():
    t = torch.arange(64.0).view(8, 8).mT
    copy = aligned(t)
    assert copy.stride() == t.stride() and torch.equal(copy, t) and copy.data_ptr() % 16 == 0


def test_the_switch_is_the_threads_own():
    with launcher.overlap(False):
        assert launcher.state.overlap is False
        seen = []
        import threading

        thread = threading.Thread(target=lambda: seen.append(launcher.state.overlap))
        thread.start()
        thread.join()
        assert seen == [True]
    assert launcher.state.overlap is True


def test_what_is_private_to_triton_is_where_it_was():
    """`launcher.entry` reads these; where they move, launches fall back to Triton's own call, which is slow."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip("entered through Triton's own call")
    import inspect

    from triton.backends.nvidia import driver
    from triton.runtime import _async_compile

    source = inspect.getsource(driver)
    for word in (
        "def make_tensordesc_arg",
        "launch_cooperative_grid",
        "launch_pdl",
        "global_scratch_size",
        "profile_scratch_size",
    ):
        assert word in source, word
    wrapped = inspect.getsource(driver.wrap_handle_tensordesc)
    assert "launcher" in inspect.signature(driver.wrap_handle_tensordesc).parameters and "def inner" in wrapped
    assert (
        launcher.closed_over(
            driver.wrap_handle_tensordesc.__wrapped__
            if hasattr(driver.wrap_handle_tensordesc, "__wrapped__")
            else lambda: None,
            "launcher",
        )
        is None
    )
    assert _async_compile.AsyncCompileMode is not None
