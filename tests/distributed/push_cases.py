"""`Push` on CPU: its kernels in Triton's interpreter, in processes that share memory, so that barriers really wait.

Run as a script with TRITON_INTERPRET=1, which must be there when triton is imported: prints what each rank said.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from cluster import launch
from dispatch_cases import E, H, K, everything, layer, on_ranks, part, single

from moesaic import Routing, use
from moesaic.parallel import AllToAll, PeerFailed
from moesaic.parallel.push import Push

M = 6
# tokens of each rank, loads, whole numbers; the interpreter is slow, and four ranks share two cores
RUNS = {
    1: [([5], "drops", True)],
    2: [([5, 0], "hot", True), ([M, 3], "drops", False), ([0, 0], "even", True)],
    4: [([5, 0, M, 2], "drops", True)],
}


def shared(folder: str, rank: int, size: int, shapes: Sequence) -> list[tuple[torch.Tensor, ...]]:
    """Every rank's tensors in files that all ranks map; rows of NaN, flags of 0."""
    made = []
    shared.calls += 1
    for i, (shape, dtype) in enumerate(shapes):
        numel = max(torch.Size(shape).numel(), 1)
        views = []
        for p in range(size):
            path = Path(folder) / f"{shared.calls}-{i}-{p}"
            if p == rank:
                last = i == len(shapes) - 1
                path.with_suffix(".new").write_bytes((b"\0" if last else b"\xff") * (numel * dtype.itemsize))
                path.with_suffix(".new").rename(path)
        dist.barrier()
        for p in range(size):
            path = Path(folder) / f"{shared.calls}-{i}-{p}"
            views.append(torch.from_file(str(path), shared=True, size=numel, dtype=dtype)[: torch.Size(shape).numel()])
        made.append(tuple(v.view(shape) for v in views))
    dist.barrier()
    return made


shared.calls = 0


def push_of(folder: str, rank: int, size: int, **options) -> Push:
    views = functools.partial(shared, folder, rank, size)
    given = dict(max_tokens=M, hidden_size=H, top_k=K, dtype=torch.float32, patience=30.0) | options
    return Push(E, views=views, **given)


def protocol(rank: int, size: int, folder: str) -> None:
    with use("torch"):  # the other operators are not what is tested here
        _protocol(rank, size, folder)


def _protocol(rank: int, size: int, folder: str) -> None:
    push = push_of(folder, rank, size)
    for i, (tokens, kind, whole) in enumerate(RUNS[size]):
        all_ = everything(i, tokens, kind, whole)
        got, same = (on_ranks(all_, tokens, rank, d) for d in (push, AllToAll(E)))
        for key, value in part(single(all_), tokens, rank).items():
            where = f"{tokens}, {kind}, {whole}, {key}, rank {rank}"
            if whole:
                assert torch.equal(got[key], value), where
            elif value.numel():
                assert (got[key] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), where
            if key in ("y", "x"):
                assert torch.equal(got[key], same[key]), where
    sends_once(push, rank, size)
    if size == 2:
        needs_no_gradient(push, rank, size)
        recomputes(push, rank, size)
    says_what_is_wrong(push)
    assert push.channel.state.tolist()[1:] == [0, 0] and not push.channel.failed.any()
    push.synchronize()
    dist.barrier()


def sends_once(push: Push, rank: int, size: int) -> None:
    """Counted in the memory: rows that were written are those of tokens with an expert here, each in its place."""
    tokens = [6] * size
    all_ = everything(5, tokens, "even", True)
    push.channel.xs[-1].fill_(torch.nan)
    dist.barrier()
    mine = slice(6 * rank, 6 * rank + 6)
    routing = Routing.from_topk(all_["weights"][mine], all_["ids"][mine], E)
    with torch.no_grad():
        rows, local, metadata = push.dispatch(all_["x"][mine], routing)
        L, written = E // size, ~rows.isnan().any(1)
        for s in range(size):
            theirs = all_["ids"][6 * s : 6 * s + 6]
            here = ((theirs // L) == rank).any(1)
            assert torch.equal(written[s * M : s * M + 6], here) and not written[s * M + 6 : s * M + M].any()
            assert torch.equal(rows[s * M : s * M + 6][here], all_["x"][6 * s : 6 * s + 6][here])
        push.combine(torch.nan_to_num(rows), metadata)
        assert rows.data_ptr() == push.channel.xs[-1].data_ptr()  # no copy where no gradient is kept
        assert local.num_tokens == size * M


def needs_no_gradient(push: Push, rank: int, size: int) -> None:
    """The experts learn though the tokens do not: the backward pass guards its memory by itself."""
    tokens = [4, 2, 6, 1][:size]
    all_ = everything(9, tokens, "even", True)
    want = part(single(all_), tokens, rank)
    start, L = sum(tokens[:rank]), E // size
    mine = slice(start, start + tokens[rank])
    up, down = (all_[n][rank * L : rank * L + L].clone().requires_grad_() for n in ("w_up", "w_down"))
    for _ in range(2):
        up.grad = down.grad = None
        routing = Routing.from_topk(all_["weights"][mine], all_["ids"][mine], E)
        y = push(all_["x"][mine], routing, lambda rows, local: layer(rows, local, up, down))
        y.backward(all_["grad"][mine])
        assert torch.equal(up.grad, want["w_up"]) and torch.equal(down.grad, want["w_down"])


def recomputes(push: Push, rank: int, size: int) -> None:
    """Two layers in one memory, checkpointed."""
    from torch.utils.checkpoint import checkpoint

    tokens = [4, 2, 6, 1][:size]
    all_ = everything(10, tokens, "even", True)
    start, L = sum(tokens[:rank]), E // size
    mine = slice(start, start + tokens[rank])

    def run(dispatcher, wrap):
        x, w = (all_[n][mine].clone().requires_grad_() for n in ("x", "weights"))
        up, down = (all_[n][rank * L : rank * L + L].clone().requires_grad_() for n in ("w_up", "w_down"))

        def body(x, w):
            routing = Routing.from_topk(w, all_["ids"][mine], E)
            rows, local, metadata = dispatcher.dispatch(x, routing)
            return dispatcher.combine(layer(rows, local, up, down), metadata)

        y = wrap(body, wrap(body, x, w), w)
        y.backward(all_["grad"][mine])
        return y.detach(), x.grad, w.grad, up.grad, down.grad

    want = run(AllToAll(E), lambda f, *a: f(*a))
    for kind in (
        lambda f, *a: f(*a),
        lambda f, *a: checkpoint(f, *a, use_reentrant=False),
        lambda f, *a: checkpoint(f, *a, use_reentrant=True),
    ):
        for a, b in zip(want, run(push, kind), strict=True):
            assert torch.equal(a, b)


def says_what_is_wrong(push: Push) -> None:
    routing = Routing.from_topk(torch.ones(3, K), torch.zeros(3, K, dtype=torch.int32), E)
    many = Routing.from_topk(torch.ones(M + 1, K), torch.zeros(M + 1, K, dtype=torch.int32), E)
    narrow = Routing.from_topk(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32), E)
    bare = Routing.from_topk(None, routing.topk_ids, E)
    for x, r, word in (
        (torch.randn(M + 1, H), many, f"max_tokens={M}"),
        (torch.randn(3, H + 1), routing, "(T, 6)"),
        (torch.randn(3, H).bfloat16(), routing, "float32"),
        (torch.randn(3, H), narrow, "3 weighed choices"),
        (torch.randn(3, H), bare, "without weights"),
    ):
        try:
            push.dispatch(x, r)
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(word)


def nobody_comes(rank: int, size: int, folder: str) -> tuple:
    """Rank 1 stalls before its dispatch; the others' wait is bounded, their output NaN, their next call an error."""
    push = push_of(folder, rank, size, patience=2e-4)
    if rank == 1:
        time.sleep(60)
    with use("torch"):
        return waits(push)


def waits(push: Push) -> tuple:
    routing = Routing.from_topk(torch.ones(3, K), torch.zeros(3, K, dtype=torch.int32), E)
    rows, _, metadata = push.dispatch(torch.randn(3, H), routing)
    y = push.combine(torch.zeros_like(rows), metadata)
    assert y.isnan().all()
    said = []
    for call in (lambda: push.dispatch(torch.randn(3, H), routing), push.synchronize):
        try:
            call()
        except PeerFailed as error:
            said.append(str(error))
    return tuple(said)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        size = int(word.removeprefix("stall"))
        with tempfile.TemporaryDirectory() as folder:
            function, enough = (nobody_comes, size - 1) if word.startswith("stall") else (protocol, None)
            errors, values, codes = launch(function, size, folder, enough=enough, limit=120)
            print(json.dumps([word, errors, values, codes]), flush=True)
