"""Train a small byte-level Mixture-of-Experts language model with its experts spread over processes (EP x FSDP).

    torchrun --nproc-per-node 4 examples/train_ep.py                    # gloo on CPU, NCCL where there are GPUs
    torchrun --nproc-per-node 4 examples/train_ep.py --steps 200 --checkpoint out/ep      # killed: start it again
    python examples/train_ep.py --steps 20 --json one.json              # one process: the same losses

The mesh has two dimensions. Along `ep` every process holds a part of the experts, and tokens travel to them; along `dp`
are copies of the experts, whose gradients FSDP2 averages and whose weights it splits. All else is split over all
processes. Every process reads its own part of one global batch, so the losses do not depend on how many there are, and
a checkpoint may be read by another number of them. The text is Python's standard library; a token is a byte.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from moesaic.bench.studies.tiny_lm import corpus, sample_batch
from moesaic.nn import MoE, MoEConfig
from moesaic.parallel import Parallel, fully_shard

SEED, RATE, WARMUP = 0, 2e-3, 10
BATCH, LENGTH = 8, 64  # sequences of the global batch, bytes of one
WIDTH, HEADS, LAYERS, EXPERTS = 64, 4, 2, 8
CONFIG = MoEConfig.preset(
    "qwen3-moe", hidden_size=WIDTH, intermediate_size=64, num_experts=EXPERTS, top_k=2, load_balancing_loss_coef=0.01
)


class Block(nn.Module):
    """Causal attention and a layer of experts, each behind a norm."""

    def __init__(self, parallel: Parallel | None):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.moe = MoE(CONFIG, parallel=parallel)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, parallel: Parallel | None):
        super().__init__()
        self.embed, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(parallel) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def auxiliary(self) -> Tensor:
        """The layers' balance losses."""
        return torch.stack([loss for block in self.blocks for loss in block.moe.losses.values()]).sum()


class Run:
    """A model, its optimizer, and the losses so far: what a checkpoint holds."""

    def __init__(self, mesh: DeviceMesh, device: str):
        torch.manual_seed(SEED)  # every process makes the same weights and keeps its part
        self.model = fully_shard(Model(Parallel(mesh)).to(device), mesh)
        groups: dict[object, list] = {}
        for p in self.model.parameters():  # an optimizer step must not mix meshes
            groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        self.optimizer = torch.optim.AdamW([dict(params=ps) for ps in groups.values()], lr=RATE, betas=(0.9, 0.98))
        self.losses: list[float] = []

    def step(self, ids: Tensor) -> None:
        """One step on this process's part of the batch; the loss is the mean over all of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (len(self.losses) + 1) / WARMUP)
        logits = self.model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss + self.model.auxiliary()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        self.losses.append(total.item() / dist.get_world_size())

    def save(self, folder: Path) -> None:
        """Write a checkpoint; its name becomes `latest` only when all of it is there."""
        name = f"step-{len(self.losses):06}"
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save(dict(model=model, optimizer=optimizer), checkpoint_id=folder / name)
        if dist.get_rank() == 0:
            (folder / name / "losses.json").write_text(json.dumps(self.losses))
            (folder / "latest.new").write_text(name)
            (folder / "latest.new").replace(folder / "latest")
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Go on from the latest checkpoint, if there is one, whatever number of processes wrote it."""
        if not (folder / "latest").exists():
            return
        place = folder / (folder / "latest").read_text()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = dict(model=model, optimizer=optimizer)
        dcp.load(state, checkpoint_id=place)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=state["optimizer"])
        self.losses = json.loads((place / "losses.json").read_text())


def batch(text: Tensor, step: int, device: str) -> Tensor:
    """This process's part of the global batch of a step."""
    ids = sample_batch(text, torch.Generator().manual_seed(SEED + 1 + step), BATCH, LENGTH + 1)
    return ids.chunk(dist.get_world_size())[dist.get_rank()].to(device)


def join() -> str:
    """Join the other processes; without torchrun there is one. Returns the device."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        return "cuda"
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return "cpu"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help='write {"losses": [...]} here')
    parser.add_argument("--ep", type=int, help="processes that share one copy of the experts (by default 2)")
    parser.add_argument("--checkpoint", type=Path, help="folder to write checkpoints to and to go on from")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    args = parser.parse_args(argv)

    device = join()
    size, rank = dist.get_world_size(), dist.get_rank()
    ep = args.ep or min(2, size)
    if size % ep or EXPERTS % ep or BATCH % size:
        parser.error(f"--ep {ep} must divide {size} processes and {EXPERTS} experts, and these the batch of {BATCH}")
    mesh = init_device_mesh(device, (size // ep, ep), mesh_dim_names=("dp", "ep"))
    run = Run(mesh, device)
    if args.checkpoint:
        args.checkpoint.mkdir(parents=True, exist_ok=True)
        run.load(args.checkpoint)
    if rank == 0:
        print(
            f"{size} processes: {size // ep} copies of {EXPERTS} experts over {ep}; {run.model.blocks[0].moe.parallel}"
        )
        if run.losses:
            print(f"going on from step {len(run.losses)}")
    text, _ = corpus()
    for step in range(len(run.losses), args.steps):
        run.step(batch(text, step, device))
        if rank == 0 and (step % 10 == 0 or step + 1 == args.steps):
            print(f"step {step + 1}  loss {run.losses[-1]:.4f}", flush=True)
        if args.checkpoint and (step + 1) % args.every == 0:
            run.save(args.checkpoint)
    if rank == 0 and args.json:
        args.json.write_text(json.dumps(dict(losses=run.losses[: args.steps])) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
