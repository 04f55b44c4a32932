"""What every transport must do, as functions `(rank, size)` that all ranks call together.

The oracle is one process: all ranks' tokens, concatenated in rank order, through all experts.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Routing, fused_experts
from moesaic.parallel import (
    AllGather,
    AllToAll,
    ChunkedOverlap,
    Hierarchical,
    Local,
    Placement,
    TokenDispatcher,
    move,
    place,
)

H, I, E, K = 6, 5, 8, 3
UNEVEN = ([5, 0, 9, 2], [0, 0, 0, 0], [0, 3, 0, 0], [4, 4, 4, 4], [1, 1, 1, 1], [0, 0, 0, 7])


def whole_numbers(generator, *shape, span: int = 2) -> Tensor:
    return torch.randint(-span, span + 1, shape, generator=generator).float()


def everything(seed: int, tokens: list[int], kind: str, whole: bool) -> dict[str, Tensor]:
    """All ranks' tokens and all experts.

    kind: even, hot (one rank's experts take all), cold (rank 0 gets none), drops, lost (every slot dropped).
    """
    g = torch.Generator().manual_seed(seed)
    T, E_rank = sum(tokens), E // len(tokens)
    make = functools.partial(whole_numbers, g) if whole else lambda *s: torch.randn(*s, generator=g)
    scores = torch.rand(T, E, generator=g)
    if kind == "hot":
        scores[:, : max(E_rank, K)] += 9
    if kind == "cold":
        scores[:, :E_rank] -= 9
    ids = scores.topk(K).indices.int()
    if kind == "drops":
        ids = ids.masked_fill(torch.rand(T, K, generator=g) < 0.4, -1)
        if T:
            ids[0] = -1
    if kind == "lost":
        ids.fill_(-1)
    weights = torch.randint(1, 4, (T, K), generator=g).float() if whole else torch.rand(T, K, generator=g)
    return dict(
        x=make(T, H), ids=ids, weights=weights, w_up=make(E, I, H), w_down=make(E, H, I), grad=make(T, H)
    )  # fmt: skip


def layer(x, routing, w_up, w_down, implementation=None):
    return fused_experts(x, w_up, w_down, routing, activation="relu", implementation=implementation)


def single(all_: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of one process."""
    leaves = {n: all_[n].clone().requires_grad_() for n in ("x", "weights", "w_up", "w_down")}
    y = layer(leaves["x"], Routing.from_topk(leaves["weights"], all_["ids"], E), leaves["w_up"], leaves["w_down"])
    y.backward(all_["grad"])
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}}


def on_ranks(all_, tokens, rank, dispatcher: TokenDispatcher, implementation=None) -> dict[str, Tensor]:
    """Output and gradients of this rank's part."""
    size = len(tokens)
    start, L = sum(tokens[:rank]), E // size
    mine = slice(start, start + tokens[rank])
    here = slice(rank * L, rank * L + L)
    leaves = {n: all_[n][mine].clone().requires_grad_() for n in ("x", "weights")}
    leaves |= {n: all_[n][here].clone().requires_grad_() for n in ("w_up", "w_down")}
    routing = Routing.from_topk(leaves["weights"], all_["ids"][mine], E)
    y = dispatcher(
        leaves["x"], routing, lambda rows, local: layer(rows, local, leaves["w_up"], leaves["w_down"], implementation)
    )
    y.backward(all_["grad"][mine])
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}}


def part(single_: dict[str, Tensor], tokens, rank) -> dict[str, Tensor]:
    start, L = sum(tokens[:rank]), E // len(tokens)
    cuts = dict(y=(start, tokens[rank]), x=(start, tokens[rank]), weights=(start, tokens[rank]),
                w_up=(rank * L, L), w_down=(rank * L, L))  # fmt: skip
    return {n: single_[n][a : a + b] for n, (a, b) in cuts.items()}


def node_mesh(size: int):
    nodes = 2 if size == 4 else 1
    return init_device_mesh("cpu", (nodes, size // nodes), mesh_dim_names=("node", "local"))


def transports(size: int) -> dict[str, TokenDispatcher]:
    mesh = node_mesh(size)
    made = {
        "all_to_all": AllToAll(E),
        "all_to_all slots": AllToAll(E, send="slot"),
        "all_gather": AllGather(E),
        "all_gather bound": AllGather(E, max_tokens=9),
        "hierarchical": Hierarchical(E, mesh),
        "hierarchical gather": Hierarchical(E, mesh, inside=AllGather(E // mesh.size(0), mesh["local"])),
        "chunked 3": ChunkedOverlap(AllToAll(E), 3),
        "chunked hierarchical": ChunkedOverlap(Hierarchical(E, mesh), 2),
        "chunked gather": ChunkedOverlap(AllGather(E), 2),
    }
    if size == 1:
        made["local"] = Local(E)
    return made


def equal_to_one_process(rank: int, size: int) -> None:
    """Bitwise for whole numbers, within 1e-5 in fp32, forward and every gradient, for every shape of load."""
    for name, dispatcher in transports(size).items():
        for i, counts in enumerate(UNEVEN):
            tokens = counts[:size]
            for kind in ("even", "hot", "cold", "drops", "lost") if i == 0 else ("drops",):
                for whole in (True, False):
                    all_ = everything(i, tokens, kind, whole)
                    want = part(single(all_), tokens, rank)
                    got = on_ranks(all_, tokens, rank, dispatcher)
                    for key, value in want.items():
                        where = f"{name}, {tokens}, {kind}, whole={whole}, {key}, rank {rank}"
                        assert got[key].shape == value.shape, where
                        if whole:
                            assert torch.equal(got[key], value), where
                        else:
                            error = (got[key] - value).abs().max().item() if value.numel() else 0.0
                            assert error <= 1e-5 * max(1.0, value.abs().max().item() if value.numel() else 1), where


def repeats_are_bitwise_equal(rank: int, size: int) -> None:
    tokens = [7, 3, 0, 5][:size]
    all_ = everything(3, tokens, "drops", False)
    for name, dispatcher in transports(size).items():
        first, again = (on_ranks(all_, tokens, rank, dispatcher) for _ in range(2))
        for key in first:
            assert torch.equal(first[key], again[key]), (name, key)


def chunks_are_bitwise_equal(rank: int, size: int) -> None:
    """1 to 8 chunks, tokens that 8 does not divide; experts whose rows do not depend on each other."""
    tokens = [13, 3, 0, 6][:size]
    all_ = everything(4, tokens, "drops", False)
    plain = on_ranks(all_, tokens, rank, AllToAll(E), "reference")
    for chunks in range(1, 9):
        overlap = ChunkedOverlap(AllToAll(E), chunks)
        got = on_ranks(all_, tokens, rank, overlap, "reference")
        for key in ("y", "x", "weights"):
            assert torch.equal(got[key], plain[key]), (chunks, key)
        for key in ("w_up", "w_down"):
            assert (got[key] - plain[key]).abs().max() <= 1e-5, (chunks, key)
        line = overlap.timeline
        for i in range(chunks - 1):
            assert line.index(f"send {i + 1}") < line.index(f"receive {i}") < line.index(f"experts {i}")
            assert line.index(f"give back {i}") < line.index(f"experts {i + 1}") < line.index(f"add {i}")


def a_token_crosses_once(rank: int, size: int) -> None:
    """Copies and messages, counted."""
    tokens = [6] * size
    all_ = everything(5, tokens, "even", True)
    start, L = 6 * rank, E // size
    ids = all_["ids"][start : start + 6]
    routing = Routing.from_topk(all_["weights"][start : start + 6], ids, E)
    x = all_["x"][start : start + 6]

    def distinct(group_experts: int) -> list[int]:
        return [
            int(((ids // group_experts) == p).any(1).sum()) for p in range(E // group_experts)
        ]  # tokens with an expert in group p

    token = AllToAll(E)
    rows, _, plan = token.dispatch(x, routing)
    assert plan.sent == distinct(L) and rows.shape[0] == sum(plan.received)
    token.combine(rows, plan)
    slot = AllToAll(E, send="slot")
    rows, _, plan = slot.dispatch(x, routing)
    assert plan.sent == [int(((ids // L) == p).sum()) for p in range(size)] and rows.shape[0] == sum(plan.received)
    if size == 4:
        two = Hierarchical(E, node_mesh(size))
        _, _, (between, inside) = two.dispatch(x, routing)
        assert between.sent == distinct(E // 2)
        node = rank // 2
        assert sum(n > 0 for i, n in enumerate(between.sent) if i != node) <= 1
        assert sum(n > 0 for i, n in enumerate(inside.sent) if i != rank % 2) <= 1


def wires(rank: int, size: int) -> None:
    """bf16 and fp8 travel within their precision, a NaN stays in its row, and gradients stay wide unless asked."""
    tokens = [6, 2, 5, 3][:size]
    all_ = everything(6, tokens, "even", False)
    want = part(single(all_), tokens, rank)
    for wire, bound in (("bf16", 2**-8), ("fp8", 2**-3)):
        got = on_ranks(all_, tokens, rank, AllToAll(E, wire=wire))
        scale = want["y"].abs().max()
        assert (got["y"] - want["y"]).abs().max() <= 2 * bound * scale
        assert not torch.equal(got["y"], want["y"])
        back = on_ranks(all_, tokens, rank, AllToAll(E, back_wire=wire, grad_wire=wire))
        assert (back["y"] - want["y"]).abs().max() <= 2 * bound * scale
        assert (back["x"] - want["x"]).abs().max() <= 4 * bound * want["x"].abs().max()
    all_ = everything(6, tokens, "even", True)
    exact = on_ranks(all_, tokens, rank, AllToAll(E, wire="bf16"))  # small whole numbers survive
    for key, value in part(single(all_), tokens, rank).items():
        assert torch.equal(exact[key], value), key
    if tokens[rank]:
        all_["x"][sum(tokens[:rank])] = torch.inf
    got = on_ranks(all_, tokens, rank, AllToAll(E, wire="fp8"))["y"]
    assert not got[:1].isfinite().all() and got[1:].isfinite().all()


def half_precision(rank: int, size: int) -> None:
    tokens = [6, 2, 5, 3][:size]
    all_ = everything(7, tokens, "drops", True)
    want = part(single(all_), tokens, rank)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = {n: t if n in ("ids", "weights") else t.to(dtype) for n, t in all_.items()}
        for dispatcher in (AllToAll(E), AllGather(E)):
            got = on_ranks(cast, tokens, rank, dispatcher)
            for key, value in want.items():
                assert got[key].dtype == (torch.float32 if key == "weights" else dtype)
                assert (got[key].float() - value).abs().max() <= 2**-7 * value.abs().max() if value.numel() else True


def disagreements_are_reported(rank: int, size: int) -> None:
    """Every rank raises the same ValueError, before any row moves, and the group still works."""
    x, ids, w = torch.randn(3, H), torch.zeros(3, K, dtype=torch.int32), torch.ones(3, K)
    last = rank == size - 1 and size > 1

    def fails(dispatcher, x, routing, *words: str) -> None:
        try:
            dispatcher.dispatch(x, routing)
        except ValueError as error:
            for word in words:
                assert word in str(error), (word, str(error))
        else:
            raise AssertionError(f"no error; wanted {words}")

    routing = Routing.from_topk(w, ids, E)
    if size > 1:
        wide = torch.randn(3, H + last)
        fails(AllToAll(E), wide, routing, "hidden_size", f"{H + 1} on rank {size - 1}")
        fails(AllToAll(E), x.to(torch.bfloat16 if last else torch.float32), routing, "dtype")
        fails(AllToAll(E, wire="bf16" if last else "same"), x, routing, "same wire")
        narrow = Routing.from_topk(w[:, : K - last], ids[:, : K - last], E)
        fails(AllToAll(E), x, narrow, "top_k", f"rank {size - 1}")
        fails(AllGather(E), wide, routing, "hidden_size")

    class Liar(AllToAll):
        def _counts(self, copies):
            return copies.tokens_per_expert + (1 if last or size == 1 else 0)

    fails(Liar(E), x, routing, "add up", f"rank {size - 1}", "not sound")

    class Stranger(AllToAll):  # right numbers, wrong ids
        def send(self, x, routing, plan=None):
            plan, rows, w, flights = super().send(x, routing, plan)
            if last or size == 1:
                flights[1].moved = torch.full_like(flights[1].wait(), -1)
            return plan, rows, w, flights

    if rank == 0:
        routing = Routing.from_topk(w, ids + (0 if size == 1 else E - 1), E)  # to the last rank
    try:
        Stranger(E).dispatch(x, routing)
    except ValueError as error:
        assert (last or size == 1) and "do not match" in str(error), error
    else:
        assert not (last or size == 1)

    rows, _, plan = AllToAll(E).dispatch(x, routing)
    try:
        AllToAll(E).combine(rows[:-1] if rows.shape[0] else rows.new_zeros(1, H), plan)
    except ValueError as error:
        assert "announced" in str(error)
    else:
        raise AssertionError("a row too few went unnoticed")


def bad_input(rank: int, size: int) -> None:
    routing = Routing.from_topk(torch.ones(3, K), torch.zeros(3, K, dtype=torch.int32), E)
    for dispatcher in (AllToAll(E), AllGather(E), ChunkedOverlap(AllToAll(E), 2), Hierarchical(E, node_mesh(size))):
        for x, r, word in (
            (torch.randn(2, H), routing, "(3, H)"),
            (torch.ones(3, H, dtype=torch.int64), routing, "floating point"),
            (torch.randn(3, H), Routing.from_topk(routing.topk_weights, routing.topk_ids, E + 1), "all 8 experts"),
            (torch.randn(3, H), routing.to_capacity(2), "packed"),
        ):
            try:
                dispatcher(x, r, lambda rows, local: rows)
            except ValueError as error:
                assert word in str(error), error
            else:
                raise AssertionError(word)
    for make, word in (
        (lambda: AllToAll(E, send="all"), "send"),
        (lambda: AllToAll(E, wire="int4"), "wire"),
        (lambda: AllToAll(7 if size > 1 else 0), "multiple"),
        (lambda: AllToAll(E, mesh=3), "DeviceMesh"),
        (lambda: AllToAll(E, mesh=node_mesh(size)), "one dimension"),
        (lambda: Hierarchical(E, None), "two dimensions"),
        (lambda: ChunkedOverlap(AllToAll(E), 0), "at least 1"),
    ):
        try:
            make()
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(word)
    try:
        AllGather(E, max_tokens=2).dispatch(torch.randn(3, H), routing)
    except ValueError as error:
        assert "max_tokens=2" in str(error)
    else:
        raise AssertionError("too many tokens")


def checkpointed_and_compiled(rank: int, size: int) -> None:
    """Both kinds of checkpointing and torch.compile give the same gradients."""
    from torch.utils.checkpoint import checkpoint

    tokens = [5, 2, 0, 4][:size]
    all_ = everything(8, tokens, "even", True)
    start, L = sum(tokens[:rank]), E // size
    mine, here = slice(start, start + tokens[rank]), slice(rank * L, rank * L + L)
    dispatcher = AllToAll(E)

    def run(wrap):
        x, w = (all_[n][mine].clone().requires_grad_() for n in ("x", "weights"))
        up, down = (all_[n][here].clone().requires_grad_() for n in ("w_up", "w_down"))

        def body(x, w):
            routing = Routing.from_topk(w, all_["ids"][mine], E)
            rows, local, metadata = dispatcher.dispatch(x * 2, routing)
            return dispatcher.combine(layer(rows, local, up, down), metadata) + 1

        y = wrap(body)(x, w)
        y.backward(all_["grad"][mine])
        return y.detach(), x.grad, w.grad, up.grad, down.grad

    want = run(lambda f: f)
    kinds = [lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
             lambda f: lambda *a: checkpoint(f, *a, use_reentrant=True)]  # fmt: skip
    if size <= 2:
        kinds.append(lambda f: torch.compile(f, backend="aot_eager"))
    for kind in kinds:
        for a, b in zip(want, run(kind), strict=True):
            assert torch.equal(a, b)


def meanwhile_runs_between(rank: int, size: int) -> None:
    x, ids = torch.randn(3, H), torch.randint(0, E, (3, K), dtype=torch.int32)
    order: list[str] = []

    class Noted(AllToAll):
        def receive(self, pending):
            order.append("receive")
            return super().receive(pending)

    Noted(E)(x, Routing.from_topk(torch.ones(3, K), ids, E), lambda rows, local: rows, lambda: order.append("shared"))
    assert order == ["shared", "receive"]


def moved_experts_give_the_same(rank: int, size: int) -> None:
    """Redundant experts, and another placement between two calls: the same bits before and after, and during."""
    tokens = [5, 0, 9, 2][:size]
    all_ = everything(11, tokens, "hot", True)
    want = part(single(all_), tokens, rank)["y"]
    start = sum(tokens[:rank])
    mine = slice(start, start + tokens[rank])
    routing = Routing.from_topk(all_["weights"][mine], all_["ids"][mine], E)
    load = torch.bincount(all_["ids"].flatten(), minlength=E)
    old, new = Placement.plain(E, size), place(load, size, slots=12)

    def run(placement, up, down, mode):
        dispatcher = AllToAll(placement.num_slots)
        return dispatcher(
            all_["x"][mine], placement.route(routing, rank, mode=mode), lambda rows, r: layer(rows, r, up, down)
        )

    before = [all_[n][old.here(rank)] for n in ("w_up", "w_down")]
    assert torch.equal(run(old, *before, "token"), want)
    after = [move(before[0], old, new)]
    assert torch.equal(run(old, *before, "rank"), want)  # the old places serve while others travel
    after.append(move(before[1], old, new))
    for mode in ("token", "rank"):
        assert torch.equal(run(new, *after, mode), want), mode
    for name, weights in zip(("w_up", "w_down"), after, strict=True):
        assert torch.equal(weights, all_[name][new.here(rank)])
        assert torch.equal(move(weights, new, old), all_[name][old.here(rank)])


CASES = [
    equal_to_one_process, repeats_are_bitwise_equal, chunks_are_bitwise_equal, a_token_crosses_once, wires,
    half_precision, disagreements_are_reported, bad_input, checkpointed_and_compiled, meanwhile_runs_between,
    moved_experts_give_the_same,
]  # fmt: skip
