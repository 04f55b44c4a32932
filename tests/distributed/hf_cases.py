"""Hugging Face models with `ep_implementation="moesaic"`, as functions `(rank, size, folder)`."""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

import moesaic.integrations.transformers  # noqa: F401
from moesaic.integrations.ep import ExpertParallelism

TINY = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=8, norm_topk_prob=True,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def save(folder: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **TINY))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name or ".gate." in name:
                p.mul_(8)
    model.save_pretrained(folder)


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def load(folder: str, experts: str, config: DistributedConfig | None = None, pretrained: bool = False):
    """A model on this rank: as `from_pretrained` makes it, or the same steps around a model in memory."""
    if config is None or pretrained:
        given = {} if config is None else dict(distributed_config=config)
        return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts, **given)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts)
    _, mesh = initialize_distributed_mesh(config)
    return type(model).maybe_distribute_model(model, config, mesh)


def equal_to_one_process(rank: int, size: int, folder: str) -> None:
    ids = torch.randint(3, 64, (size, 6), generator=torch.Generator().manual_seed(2))
    one = load(folder, "eager")
    pretrained = importlib.util.find_spec("accelerate") is not None  # from_pretrained wants it for a mesh
    want = one(input_ids=ids, labels=ids)
    want.loss.backward()
    for sizes in (dict(fsdp_size=size, tp_size=1, ep_size=size), dict(tp_size=size, ep_size=size, tp_plan="auto")):
        for experts in ("moesaic", "eager"):
            config = DistributedConfig(ep_implementation="moesaic", **sizes)
            model = load(folder, experts, config, pretrained and experts == "moesaic")
            mine = ids[rank : rank + 1] if "fsdp_size" in sizes else ids
            out = model(input_ids=mine, labels=mine)
            logits = want.logits[rank : rank + 1] if "fsdp_size" in sizes else want.logits
            error = ((out.logits - logits).abs().max() / logits.abs().max()).item()
            assert error < 1e-5, (sizes, experts, error)
            out.loss.backward()
            layer, plain = model.model.layers[0].mlp.experts, one.model.layers[0].mlp.experts
            for name in ("gate_up_proj", "down_proj"):
                grad, wanted = whole(getattr(layer, name).grad), getattr(plain, name).grad
                error = ((grad - wanted).abs().max() / wanted.abs().max()).item()
                assert error < 1e-5, (sizes, experts, name, error)
            assert isinstance(implementation_of(layer), ExpertParallelism)
    dist.barrier()


def implementation_of(experts):
    """What transformers calls for a module of experts."""
    return next(c.cell_contents for c in experts.forward.__closure__ if hasattr(c.cell_contents, "dispatcher"))
