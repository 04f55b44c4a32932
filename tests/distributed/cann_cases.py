"""CANN's operators between ranks, as functions `(rank, size)`, against one process that sees all ranks' inputs."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from moesaic.parallel.distribute import (
    all_to_all_matmul,
    alltoallv_gmm,
    gmm_alltoallv,
    matmul_all_to_all,
    moe_distribute_combine,
    moe_distribute_dispatch,
)

H, K, E = 6, 3, 8
COUNTS = [4, 0, 5, 2]


def whole(g, *shape):
    return torch.randint(-2, 3, shape, generator=g).float()


def inputs(size: int, special: int = 0):
    """Per rank: x, ids, scales; ids distinct in a row."""
    made = []
    for r in range(size):
        g = torch.Generator().manual_seed(100 + r)
        T = COUNTS[r]
        ids = torch.rand(T, E + special, generator=g).topk(K).indices.int()
        made.append((whole(g, T, H), ids, torch.randint(1, 4, (T, K), generator=g).float()))
    return made


def dispatch_and_combine(rank: int, size: int) -> None:
    """Counts, order, expert e multiplying by e + 1; masks of tokens and of choices; zero, copy and constant experts."""
    Z, C, N = 1, 2, 1
    for mask in (None, "tokens", "choices"):
        every = inputs(size, Z + C + N)
        x, ids, scales = every[rank]
        x, scales = x.clone().requires_grad_(), scales.clone().requires_grad_()
        masks = [
            torch.rand(i.shape, generator=torch.Generator().manual_seed(r)) < 0.6 for r, (_, i, _) in enumerate(every)
        ]
        if mask == "tokens":
            masks = [(torch.arange(len(i)) < len(i) - 1)[:, None].expand_as(i) for _, i, _ in every]
        if mask is None:
            masks = [torch.ones_like(i, dtype=torch.bool) for _, i, _ in every]
        given = dict(tokens=masks[rank][:, 0], choices=masks[rank]).get(mask)
        special = dict(moe_expert_num=E, zero_expert_num=Z, copy_expert_num=C, const_expert_num=N)
        got = moe_distribute_dispatch(x, ids, expert_scales=scales, x_active_mask=given, **special)
        L = E // size
        want, weights, pairs = [], [], []
        for e in range(rank * L, rank * L + L):
            for r, (xs, i, s) in enumerate(every):
                t, k = ((i == e) & masks[r]).nonzero(as_tuple=True)
                want.append(xs[t])
                weights.append(s[t, k])
                pairs.append(len(t))
        assert torch.equal(got.expand_x, torch.cat(want)) and torch.equal(got.expand_scales, torch.cat(weights))
        assert got.ep_recv_counts.tolist() == torch.tensor(pairs).cumsum(0).tolist()
        counts = torch.tensor(pairs).view(L, size).sum(1)
        assert got.expert_token_nums.tolist() == counts.tolist()
        factor = torch.arange(rank * L, rank * L + L).repeat_interleave(counts)[:, None] + 1.0
        g = torch.Generator().manual_seed(7)
        a1, a2, v = torch.tensor([[2.0]]), torch.tensor([[3.0]]), whole(g, 1, H)
        y = moe_distribute_combine(
            got.expand_x * factor, ids, got.assist_info, scales, ori_x=x, const_expert_alpha_1=a1,
            const_expert_alpha_2=a2, const_expert_v=v, shared_expert_x=torch.ones_like(x), **special,
        )  # fmt: skip
        w = torch.where((ids < E) & ~masks[rank], 0, scales)
        oracle = ((ids + 1) * w * (ids < E)).sum(1, keepdim=True) * x
        oracle = oracle + (scales * ((ids >= E + Z) & (ids < E + Z + C))).sum(1, keepdim=True) * x
        oracle = oracle + (scales * (ids == E + Z + C)).sum(1, keepdim=True) * (2 * x + 3 * v) + 1
        assert torch.equal(y, oracle), mask
        grads = [torch.autograd.grad(out.square().sum(), (x, scales), retain_graph=True) for out in (y, oracle)]
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b), mask


def shared_ranks(rank: int, size: int) -> None:
    """The first ranks hold shared experts: every token goes to one copy of each, unweighted."""
    if size == 1:
        return
    S, shared = size // 2, 1 if size == 2 else 2
    every = inputs(size)
    x, ids, scales = every[rank]
    options = dict(moe_expert_num=E, shared_expert_num=shared, shared_expert_rank_num=S)
    got = moe_distribute_dispatch(x, ids, expert_token_nums_type=0, **options)
    L, each = E // (size - S), S // shared
    if rank < S:
        want = torch.cat([xs for r, (xs, _, _) in enumerate(every) if rank % each == r % each])
        assert torch.equal(got.expand_x, want) and got.expert_token_nums[-1] == len(want)
        factor = torch.full((len(want), 1), 10.0 * (rank // each + 1))
    else:
        mine = range((rank - S) * L, (rank - S) * L + L)
        counts = [sum(int((i == e).sum()) for _, i, _ in every) for e in mine]
        assert got.expert_token_nums.tolist() == torch.tensor(counts).cumsum(0).tolist()
        factor = torch.tensor(list(mine)).repeat_interleave(torch.tensor(counts))[:, None] + 1.0
    y = moe_distribute_combine(got.expand_x * factor, ids, got.assist_info, scales, moe_expert_num=E)
    total = sum(10.0 * (s + 1) for s in range(shared))
    assert torch.equal(y, ((ids + 1) * scales).sum(1, keepdim=True) * x + total * x)


def int8(rank: int, size: int) -> None:
    """127 / largest magnitude there, its inverse beside the rows; both ways within a 127th."""
    x, ids, scales = inputs(size)[rank]
    got = moe_distribute_dispatch(x, ids, moe_expert_num=E, quant_mode=2)
    plain = moe_distribute_dispatch(x, ids, moe_expert_num=E)
    assert got.expand_x.dtype == torch.int8 and (got.expand_x >= -127).all()
    rows = got.expand_x.float() * got.dynamic_scales[:, None]
    most = plain.expand_x.abs().amax(1, keepdim=True)
    assert ((rows - plain.expand_x).abs() <= most / 127 * 0.51 + 1e-6).all()
    assert torch.equal(got.expert_token_nums, plain.expert_token_nums)
    y, q = (
        moe_distribute_combine(
            plain.expand_x, ids, plain.assist_info, scales, moe_expert_num=E, comm_quant_mode=mode
        ) for mode in (0, 2)
    )  # fmt: skip
    assert ((y - q).abs() <= scales.sum(1, keepdim=True) * 2 / 127 * 0.51 + 1e-5).all()
    assert torch.equal(y, scales.sum(1, keepdim=True) * x)


def waiting_times(rank: int, size: int) -> None:
    x, ids, _ = inputs(size)[rank]
    told = torch.zeros(size, dtype=torch.int64)
    dist.barrier()
    if rank == size - 1 and size > 1:
        time.sleep(0.2)
    moe_distribute_dispatch(x, ids, moe_expert_num=E, performance_info=told)
    if size > 1 and rank < size - 1:
        assert told[-1] > 150_000 and told[:-1].sum() < told[-1], told
    else:
        assert told[-1] == 0 and told.sum() < 150_000, told


def products(rank: int, size: int) -> None:
    """The grouped pairs against each other and one process; the dense pairs."""
    L, N = 2, 5
    g = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 4, (size, size, L), generator=g)  # [from][to][expert]
    rows = [whole(g, int(counts[r].sum()), H) for r in range(size)]
    weights = whole(g, size, L, H, N)
    x, w = rows[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()
    send, recv = counts[rank].flatten().tolist(), counts[:, rank].flatten().tolist()
    shared = whole(g, 3, H)
    y, mm, kept = alltoallv_gmm(x, w, send, recv, mm_x=shared, mm_weight=w[0], permute_out_flag=True)
    want = []
    for e in range(L):
        for r in range(size):
            parts = rows[r].split(counts[r].flatten().tolist())
            want.append(parts[rank * L + e] @ weights[rank, e])
    assert torch.equal(y, torch.cat(want)) and torch.equal(mm, shared @ w[0]) and kept.shape == (sum(recv), H)
    y.sum().backward()
    owner = torch.tensor([weights[p, e].sum(1).tolist() for p in range(size) for e in range(L)])
    assert torch.equal(x.grad, owner.repeat_interleave(torch.tensor(send), 0))
    identity = torch.eye(N).expand(L, N, N)
    back, _ = gmm_alltoallv(y.detach(), identity, recv, send)
    parts = rows[rank].split(send)
    assert torch.equal(back, torch.cat([parts[p * L + e] @ weights[p, e] for p in range(size) for e in range(L)]))

    BS, M = 2 * size, 3 * size
    xs, x2, bias = whole(g, size, BS, H), whole(g, H, M), whole(g, M)
    got = matmul_all_to_all(xs[rank], x2, bias=bias)
    cut = slice(rank * 3, rank * 3 + 3)
    assert torch.equal(got, torch.cat([(xs[r] @ x2 + bias)[:, cut] for r in range(size)]))
    big = whole(g, size * H, 4)
    y, gathered = all_to_all_matmul(xs[rank], big)
    want = torch.cat([xs[r][rank * 2 : rank * 2 + 2] for r in range(size)], 1)
    assert torch.equal(gathered, want) and torch.equal(y, want @ big)


def bad_input(rank: int, size: int) -> None:
    x, ids, _ = torch.ones(2, H), torch.zeros(2, K, dtype=torch.int32), None
    for call, word in (
        (lambda: moe_distribute_dispatch(x, ids, moe_expert_num=E, quant_mode=1), "quant_mode"),
        (lambda: moe_distribute_dispatch(x, ids, moe_expert_num=E, shared_expert_rank_num=size), "without shared"),
        (lambda: moe_distribute_dispatch(x, ids + E, moe_expert_num=E), "special experts"),
        (lambda: alltoallv_gmm(x, torch.ones(1, H, 2), [1], [1, 2]), "one number for each"),
        (lambda: matmul_all_to_all(x, torch.ones(H, size + 1)) if size > 1 else _raise(), "multiple"),
    ):
        try:
            call()
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(word)


def _raise():
    raise ValueError("multiple")


CASES = [dispatch_and_combine, shared_ranks, int8, waiting_times, products, bad_input]
