"""`nn.MoE(config, parallel=...)`, functions `(rank, size)`: against one process, under FSDP2, split, saved, loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moesaic import RouterConfig, Unsupported
from moesaic.nn import MoE, MoEConfig
from moesaic.parallel import AllToAll, ChunkedOverlap, Hierarchical, Parallel, choose, explain, fully_shard

CONFIG = MoEConfig(
    12, 8, 8, RouterConfig(top_k=3, score="softmax", order="pre_renorm"), num_shared_experts=1, shared_gated=True,
    load_balancing_loss_coef=0.1, z_loss_coef=0.01, layout="interleaved",
)  # fmt: skip
TOKENS = [5, 0, 7, 4]


def tokens_of(size: int) -> tuple[torch.Tensor, list[int]]:
    counts = TOKENS[:size] if size > 1 else [9]
    return torch.randn(sum(counts), 12, generator=torch.Generator().manual_seed(3)), counts


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(a: torch.Tensor, b: torch.Tensor, where: str, bound: float = 1e-5) -> None:
    assert a.shape == b.shape, where
    assert (a - b).abs().max() <= bound * max(1.0, b.abs().max().item()), (where, (a - b).abs().max())


def made(parallel=None, config=CONFIG) -> MoE:
    torch.manual_seed(0)
    return MoE(config, parallel=parallel)


def reference(x, counts, config=CONFIG) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """One process: the mean over ranks of each one's sum of squares, plus the whole batch's losses."""
    layer = made(config=config)
    y = layer(x)
    (y.square().sum() / len(counts) + sum(layer.losses.values())).backward()
    return (y.detach(), {n: p.grad for n, p in layer.named_parameters()},
            {n: v.item() for n, v in layer.losses.items()})  # fmt: skip


def step(layer, x, counts, rank) -> torch.Tensor:
    start = sum(counts[:rank])
    y = layer(x[start : start + counts[rank]])
    (y.square().sum() + sum(layer.losses.values())).backward()
    return y.detach()


def meshes(size: int):
    yield "ep", init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    if size == 4:
        yield "dp, ep", init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        yield "ep, tp", init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))


def layers_are_equal_to_one_process(rank: int, size: int) -> None:
    for name, mesh in meshes(size):
        ep = mesh if mesh.ndim == 1 else mesh["ep"]
        for dispatcher in (None, AllToAll(8, ep, send="slot"), ChunkedOverlap(AllToAll(8, ep), 2)):
            x, counts = tokens_of(size)
            who, batches = rank, size
            if name == "ep, tp":  # ranks that split experts have the same tokens
                counts, who, batches = TOKENS[:2], rank // 2, 2
                x = x[: sum(counts)]
            want, grads, losses = reference(x, counts)
            layer = made(Parallel(mesh, dispatcher))
            y = step(layer, x, counts, who)
            start = sum(counts[:who])
            where = f"{name}, {layer.parallel}"
            close(y, want[start : start + counts[who]], where) if counts[who] else None
            for n, p in layer.named_parameters():
                grad = whole(p.grad)
                if "experts." in n and not n.startswith("shared"):
                    assert isinstance(p, DTensor), n
                    assert p.to_local().shape[0] == 8 // ep.size()
                    if name == "dp, ep":
                        dist.all_reduce(grad, group=mesh["dp"].get_group())
                        grad = grad / mesh["dp"].size()
                else:
                    dist.all_reduce(grad, group=layer.parallel.group)
                    grad = grad / batches
                close(grad, grads[n], f"{where}, {n}")
            for n, value in layer.losses.items():
                mean = value.detach().clone()
                dist.all_reduce(mean, group=layer.parallel.group)
                close(mean / batches, torch.tensor(losses[n]), f"{where}, {n}")
            assert copy.deepcopy(layer).parallel is layer.parallel


class Model(nn.Module):
    """A layer between two others, as FSDP wants to see one."""

    def __init__(self, parallel=None):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(12, 12)
        self.moe = MoE(CONFIG, parallel=parallel)
        self.last = nn.Linear(12, 12)

    def forward(self, x):
        return self.last(x + self.moe(self.first(x)))


def trains_under_fsdp(rank: int, size: int) -> None:
    """Three steps of AdamW with experts x copies: the same weights as one process."""
    shapes = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4)]}[size]
    x, counts = tokens_of(size)
    start = sum(counts[:rank])
    single = Model()
    optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
    wanted = []
    for _ in range(3):
        y = single(x)
        loss = y.square().sum() / size + sum(single.moe.losses.values())
        loss.backward()
        wanted.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    for shape in shapes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
        model = fully_shard(Model(Parallel(mesh)), mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for want in wanted:
            y = model(x[start : start + counts[rank]])
            loss = y.square().sum() + sum(model.moe.losses.values())
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            assert abs(total.item() / size - want) <= 1e-5 * abs(want), (shape, total.item() / size, want)
            optimizer.step()
            optimizer.zero_grad()
        assert {p.placements for n, p in model.named_parameters() if ".experts." in n and "shared" not in n}
        for (n, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
            close(whole(p).detach(), q.detach(), f"{shape}, {n}", 2e-5)


def saves(rank: int, size: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2, size // 2) if size > 1 else (1, 1), mesh_dim_names=("dp", "ep"))
    model = fully_shard(Model(Parallel(mesh)), mesh)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    dist.barrier()


def loads(rank: int, size: int, folder: str) -> None:
    """What another number of ranks saved, into this number, split another way, and into a plain layer."""
    want = Model().state_dict()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "ep"))
    for model in (Model(Parallel(mesh)), fully_shard(Model(Parallel(mesh)), mesh), Model()):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        state = model.state_dict()
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state)
        for name, value in model.state_dict().items():
            assert torch.equal(whole(value), want[name]), name
    dist.barrier()


def choices_have_reasons(rank: int, size: int) -> None:
    flat = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    for chosen, mesh, need in (
        ("local" if size == 1 else "all_to_all", flat, {}),
        ("local" if size == 1 else "all_gather", flat, dict(max_tokens=16)),
        ("local" if size == 1 else "all_to_all", flat, dict(max_tokens=4096)),
        ("local" if size == 1 else "all_to_all", None, {}),
    ):
        choice = explain(mesh, num_experts=8, **need)
        assert choice.chosen == chosen, choice
        assert f"{chosen:<13} chosen" in str(choice)
        assert choose(mesh, num_experts=8, verbose=False, **need).name == chosen
    sizes = dict(max_tokens=4096, hidden_size=64, top_k=2)
    for need, reason in (
        (dict(device="cpu") | sizes, "needs GPUs"),
        (dict(device="cuda"), "max_tokens, hidden_size and top_k"),
        (dict(device="cuda", dtype=torch.float64) | sizes, "got float64"),
        (dict(device="cuda", chunks=2) | sizes, "chunks"),
    ):
        assert reason in dict(explain(flat, num_experts=8, **need).reasons)["push"], reason
    if size == 4:
        nodes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
        assert "2 nodes" in dict(explain(nodes, num_experts=8, device="cuda", **sizes).reasons)["push"]
        assert isinstance(choose(nodes, num_experts=8, verbose=False), Hierarchical)
        assert isinstance(choose(nodes, num_experts=8, verbose=False, transport="all_to_all"), AllToAll)
    assert isinstance(choose(flat, num_experts=8, chunks=2, verbose=False), ChunkedOverlap)
    try:
        explain(flat, num_experts=8, transport="hierarchical")
    except Unsupported as error:
        assert "two dimensions" in str(error)
    else:
        raise AssertionError("forced what cannot run")


def layers_say_what_is_wrong(rank: int, size: int) -> None:
    flat = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    other = init_device_mesh("cpu", (1, size), mesh_dim_names=("a", "b"))
    split = init_device_mesh("cpu", (1, size), mesh_dim_names=("ep", "tp"))
    cases = [
        (CONFIG, other, "named 'ep'"),
        (CONFIG, 3, "named 'ep'"),
        (CONFIG, Parallel(flat, AllToAll(16, flat)), "must spread 8 experts"),
    ]
    if size > 1:
        cases += [
            (CONFIG.replace(num_experts=9), flat, "multiple"),
            (CONFIG.replace(layout="concatenated"), split, "interleaved"),
            (CONFIG.replace(expert_bias=True), split, "biases"),
            (CONFIG.replace(intermediate_size=7), split, "intermediate_size=7"),
        ]
    for config, parallel, word in cases:
        try:
            MoE(config, parallel=parallel)
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(word)
    try:
        fully_shard(Model(flat), flat)
    except ValueError as error:
        assert "two dimensions" in str(error)
    else:
        raise AssertionError("one dimension")


def begins_on_the_meta_device(rank: int, size: int) -> None:
    """Nothing is allocated before `to_empty`, and then only this rank's part."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    layer, filled = MoE(CONFIG, device="meta", parallel=mesh), made(mesh)
    assert layer.experts.down_proj.is_meta and layer.experts.down_proj.to_local().shape[0] == 8 // size
    layer.to_empty(device="cpu")
    layer.load_state_dict(filled.state_dict())
    x, counts = tokens_of(size)
    mine = x[sum(counts[:rank]) :][: counts[rank]]
    assert torch.equal(layer.eval()(mine), filled.eval()(mine))


CASES = [
    layers_are_equal_to_one_process, trains_under_fsdp, choices_have_reasons, layers_say_what_is_wrong,
    begins_on_the_meta_device,
]  # fmt: skip
CHECKPOINTS = [(4, 2), (4, 1), (1, 4)]  # saved with, loaded with


def folder_of(root: str, size: int) -> str:
    return str(Path(root) / f"from{size}")
