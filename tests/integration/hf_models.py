"""Real architectures built small, one training step of them, and the distance between two steps."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

BAR = 2e-6
BASE = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts_per_tok=2,
)  # fmt: skip
QWEN = dict(num_experts=8, moe_intermediate_size=32, intermediate_size=48)
LOCAL = dict(num_local_experts=8, intermediate_size=32)
ROUTED = dict(n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=32, intermediate_size=64,
              first_k_dense_replace=1, n_group=1, topk_group=1)  # fmt: skip
MODELS = {
    "mixtral": dict(LOCAL, intermediate_size=48),
    "qwen2_moe": dict(QWEN, shared_expert_intermediate_size=32),
    "qwen3_moe": dict(QWEN, head_dim=16, norm_topk_prob=True),
    "deepseek_v3": dict(ROUTED, n_group=2, num_experts_per_tok=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                        qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4),
    "gpt_oss": dict(LOCAL, head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
    "olmoe": dict(num_experts=8, intermediate_size=32, num_experts_per_tok=4),
    "glm4_moe": dict(ROUTED, head_dim=16),
    "granitemoe": LOCAL,
    "phimoe": LOCAL,
    "ernie4_5_moe": dict(intermediate_size=64, moe_intermediate_size=32, moe_num_experts=8, moe_k=2,
                         moe_num_shared_experts=1, moe_layer_start_index=0, moe_layer_end_index=1),
    "dots1": ROUTED,
    "minimax_m2": dict(LOCAL, head_dim=16),
}  # fmt: skip
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))


def build(name: str, implementation: str) -> nn.Module:
    """A model with fixed weights; those of experts and routers are enlarged, for as initialised they hardly matter."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **{**BASE, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).float()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "experts" in parameter or "router" in parameter or "gate.weight" in parameter:
                value.normal_(0, 0.2)
    return model


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits and every gradient of one step, auxiliary loss included where the model has one."""
    model.train().zero_grad(set_to_none=True)
    # 5.17's granitemoe cannot compute its own auxiliary loss
    aux = hasattr(model.config, "router_aux_loss_coef") and model.config.model_type != "granitemoe"
    torch.manual_seed(7)  # phimoe samples its routing in training
    out = model(input_ids=IDS, labels=IDS, **({"output_router_logits": True} if aux else {}))
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def experts_of(model: nn.Module) -> nn.Module:
    """The last module of experts."""
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")][-1]


def distances(got: dict, want: dict) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {k: ((got[k] - want[k]).abs().max() / want[k].abs().max().clamp_min(1e-30)).item() for k in want}


def assert_within(got: dict, want: dict, bar: float = BAR) -> None:
    far = {k: v for k, v in distances(got, want).items() if not v <= bar}
    assert not far, f"further than {bar} from the reference: {far}"


def choices(tokens: int, experts: int = 8, top_k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=g).topk(top_k).indices, torch.rand(tokens, top_k, generator=g) + 0.1


# Models whose classes of experts transformers does not dispatch; they run our operators through its patch mapping.
UNDECORATED = {
    "dbrx": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=128,
                 attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0),
                 ffn_config=dict(hidden_size=64, ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2,
                                 ffn_act_fn={"name": "silu"})),
    "jetmoe": dict(BASE, num_local_experts=4, intermediate_size=48, kv_channels=16, head_dim=16),
    "llama4_text": dict(BASE, intermediate_size=48, intermediate_size_mlp=48, num_local_experts=4, head_dim=16,
                        interleave_moe_layer_step=1),
    "longcat_flash": dict(BASE, head_dim=8, num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=32,
                          n_routed_experts=6, zero_expert_num=2, moe_topk=3, q_lora_rank=16, kv_lora_rank=16,
                          qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4),
}  # fmt: skip


def build_undecorated(name: str, implementation: str) -> nn.Module:
    """A model of `UNDECORATED` with fixed weights."""
    config = AutoConfig.for_model(name, **UNDECORATED[name])
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).float()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=g)
    return model
