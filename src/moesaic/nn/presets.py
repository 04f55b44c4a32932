"""The layers of published models: one row a model, as keywords of `MoEConfig`, which `nn.config` makes into `PRESETS`.

A preset bears its model's type in transformers, with dashes (`kimi-k2` is a DeepSeek-V3 there, `deepseek-v4-hash` the
first layers of that model). Numbers are those of the published checkpoint, or of the configuration class where only
that says them. The router is the model's own to the last constant; each is compared with the module in transformers
that it stands for: choice, weights and gradients. To add a model, add a row.

**What a preset leaves to the caller**, who puts the parts together:

- `axk1` norms the layer's output; `jetmoe` adds a bias to it; `cohere2-moe` may have shared experts, and then takes the
  mean of both outputs.
- `gemma4`, `diffusion-gemma`: the router reads the residual and the experts read another norm of it, beside a dense
  MLP: `layer.experts(normed, layer.gate(residual))`.
- `nemotron-h` and `muse-spark` project tokens to a latent width between router and experts:
  `Experts(config.replace(hidden_size=latent))` with `Router(config)`. `muse-spark` norms each expert's output too.
- `ernie4-5-vl-moe`: two such layers, of I = 1536 for text and I = 512 for vision, each with its `token_mask`; the sum
  of their outputs. Its shared experts belong to the text layer, and to every token: `layer.shared_experts(x)`.
- `zaya`: the logits come from an MLP with a state carried from layer to layer. Assign a module that makes them and
  calls `route(logits, config.router, bias=...)` to `layer.gate`. Its last column, "skip", is a zero expert.
- `hunyuan-v1-moe`: top_k and E may differ by layer. `step3p7`: the last layers clamp behind the silu, by 7 the routed
  and by 16 the shared experts: `activation="swiglu_step"`, `shared_activation=` the same entry `with_constants`.
- `switch-transformers`, `nllb-moe`: the capacity is a number of slots, counted over the tokens of a call; transformers
  counts Switch's over each sequence.
"""

from __future__ import annotations

from typing import Any

from ..cases import CASES
from ..ops.route import RouterConfig

Row = dict[str, Any]


def _row(sizes: str | tuple[int, int, int, int], router: Row | None = None, *, aux: float = 0.0, **fields: Any) -> Row:
    """Keywords of `MoEConfig` from a shape `(H, I, E, K)` or the name of one in `CASES`.

    `aux` is transformers' `router_aux_loss_coef`; its form of the balance loss is K times ours.
    """
    if isinstance(sizes, str):
        case = CASES[sizes]
        fields = {"activation": case.activation, "layout": case.layout, "transposed": case.transposed,
                  "expert_bias": case.bias, **fields}  # fmt: skip
        sizes = (case.hidden_size, case.intermediate_size, case.num_experts, case.top_k)
    H, I, E, K = sizes
    if aux:
        fields["load_balancing_loss_coef"] = aux * K
    return dict(
        hidden_size=H, intermediate_size=I, num_experts=E, router=RouterConfig(top_k=K, **(router or {})), **fields
    )


# ---------------------------------------------------------------- families of routers
def _biased(scale: float = 1.0, eps: float = 1e-20, groups: tuple[int, int] = (1, 1), **more: Any) -> Row:
    """DeepSeek-V3's: sigmoid, a bias for the choice alone, groups ranked by their two best, weights of sum `scale`."""
    return dict(score="sigmoid", norm_eps=eps, scale=scale, num_groups=groups[0], topk_groups=groups[1], **more)


def _v3(sizes: Any, router: Row, shared: int = 1, **fields: Any) -> Row:
    return _row(sizes, router, selection_bias=True, num_shared_experts=shared, **fields)


_PRE = dict(order="pre")
_POST = dict(order="post")
_GATED: Row = dict(num_shared_experts=1, shared_gated=True)
_CLAMPED: Row = dict(activation="swiglu_clamped")
_V4 = dict(score="sqrt_softplus", norm_eps=1e-20, scale=1.5)
_MISTRAL = dict(norm_eps=1e-20, group_mask_value=0.0)
_ERNIE = dict(norm_min=1e-12)

# A number of slots, not a share of the tokens: a factor so small that the least capacity always holds.
_SLOTS_64: Row = dict(capacity_factor=1e-9, min_capacity=64)

ROWS: dict[str, Row] = {
    # softmax over all experts, the chosen ones normalised or not
    "mixtral": _row("mixtral-8x7b", aux=0.001),
    "minimax": _row((6144, 9216, 32, 2), aux=0.001),
    "qwen2-moe": _row("qwen2-moe-a2.7b", _PRE, num_shared_experts=4, shared_gated=True, aux=0.001),
    "qwen3-moe": _row("qwen3-30b-a3b", aux=0.001),
    "qwen3-next": _row("qwen3-next-80b", **_GATED, aux=0.001),
    "qwen3-5-moe": _row((2048, 512, 256, 8), **_GATED, aux=0.001),
    "qwen4-exp": _row((2048, 512, 512, 10), **_GATED, aux=0.001),
    "mellum": _row((2304, 896, 64, 8), aux=0.001),
    # the losses of its paper (arXiv 2409.02060), whose balance loss has our form
    "olmoe": _row("olmoe", _PRE, load_balancing_loss_coef=0.01, z_loss_coef=0.001),
    "flex-olmo": _row((4096, 11008, 7, 5), _PRE, aux=0.01),
    "jamba": _row((4096, 14336, 16, 2), _PRE, aux=0.001),
    "dbrx": _row((6144, 10752, 16, 4), dict(norm_p=1.0)),
    "hunyuan-v1-moe": _row((4096, 3072, 64, 8), num_shared_experts=1),
    "gemma4": _row("gemma4-26b", router_norm_eps=1e-6, learned_scale="per_expert"),
    "diffusion-gemma": _row("gemma4-26b", router_norm_eps=1e-6, learned_scale="per_expert"),
    "phimoe": _row("phi-3.5-moe", dict(policy="sparsemixer", order="pre", noise_std=0.01), aux=0.001),
    # softmax, groups masked with 0
    "deepseek-v2": _row(
        (5120, 1536, 160, 6),
        dict(order="pre", scale=16.0, num_groups=8, topk_groups=3, group_score="max", group_mask_value=0.0),
        num_shared_experts=2,
    ),
    "mistral4": _row((4096, 2048, 128, 4), _MISTRAL, num_shared_experts=1),
    "mistral-large4": _row((6144, 6144, 128, 4), _MISTRAL, num_shared_experts=1),
    # softmax, a bias for the choice alone
    "ernie4-5-moe": _row("ernie-4.5-21b", _ERNIE, selection_bias=True, num_shared_experts=2, aux=0.001),
    "ernie4-5-vl-moe": _row("ernie-4.5-21b", _ERNIE, selection_bias=True, num_shared_experts=2, aux=0.001),
    "longcat-flash": _row((6144, 2048, 512, 12), dict(order="pre", scale=6.0, identity_experts=256),
                          selection_bias=True),
    "zaya": _row((2048, 2048, 16, 1), dict(order="pre", zero_experts=1), selection_bias=True),
    # the choice on the logits, then softmax or sigmoid of the chosen
    "gpt-oss": _row("gpt-oss-120b", _POST, router_bias=True, aux=0.001),
    # its router divides by K and its layer multiplies by K
    "openai-privacy-filter": _row(
        (640, 640, 128, 4), dict(order="post", divide_by_k=True), router_bias=True, routed_scale=4.0,
        activation="swiglu_oai", transposed=True, expert_bias=True, aux=0.001,
    ),
    "granitemoe": _row("granite-3-3b", _POST, aux=0.001),
    "jetmoe": _row((2048, 5632, 8, 2), _POST),
    "aria": _row((2560, 1664, 64, 6), _POST, num_shared_experts=2, transposed=True),
    "cohere2-moe": _row((8192, 22528, 8, 2), _POST),
    "llama4": _row("llama4-scout", dict(order="post", score="sigmoid"), weight_on_input=True, num_shared_experts=1,
                   aux=0.001),
    # sigmoid without a bias
    "flint": _row((2048, 512, 256, 6), dict(score="sigmoid"), num_shared_experts=1, shared_intermediate_size=1024,
                  aux=0.0005),
    # DeepSeek-V3's family
    "deepseek-v3": _v3("deepseek-v3", _biased(2.5, groups=(8, 4))),
    "deepseek-v32": _v3("deepseek-v3", _biased(2.5, groups=(8, 4))),
    "kimi-k2": _v3("kimi-k2", _biased(2.827)),
    "kimi-linear": _v3((2304, 1024, 256, 8), _biased(2.446)),
    "dots1": _v3((4096, 1408, 128, 6), _biased(2.5), shared=2),
    "dots3-note": _v3((5120, 1536, 256, 8), _biased()),
    "bailing-hybrid": _v3((2560, 768, 512, 8), _biased(2.5, groups=(8, 4))),
    "axk1": _v3((7168, 2048, 192, 8), _biased(2.5, groups=(8, 4))),
    "axk2": _v3((2048, 512, 128, 8), _biased(2.5, group_mask_value=0.0)),
    "glm4-moe": _v3((4096, 1408, 128, 8), _biased()),
    "glm4-moe-lite": _v3((2048, 1536, 64, 4), _biased(1.8)),
    "glm-moe-dsa": _v3((6144, 2048, 256, 8), _biased(2.5)),
    "glm5-next": _v3((4096, 2048, 288, 8), _biased(2.5), **_CLAMPED, aux=0.001),
    "hy-v3": _v3((4096, 1536, 192, 8), _biased(2.826)),
    "hy-v4": _v3((2816, 768, 256, 8), _biased(2.827), **_CLAMPED, shared_activation="swiglu"),
    "nemotron-h": _v3("nemotron-h", _biased(5.0), shared_intermediate_size=5376),
    "mimo-v2-flash": _v3((4096, 2048, 256, 8), _biased(), shared=0),
    "solar-open": _v3((4096, 1280, 128, 8), _biased()),
    "exaone-moe": _v3((4096, 1024, 64, 8), _biased(2.5)),
    "afmoe": _v3((2048, 1408, 64, 6), _biased(), shared=2),
    "inkling2": _v3((4608, 2304, 384, 8), _biased(8.0), shared=0, activation="swiglu_softcapped"),
    "muse-spark": _v3((8192, 4096, 256, 8), _biased(eps=1e-15, multiplier=2**-2.5), shared=0),
    "lfm2-moe": _v3((2048, 1792, 32, 4), _biased(eps=1e-6), shared=0),
    "minimax-m2": _v3("minimax-m2", _biased(eps=0.0), shared=0, aux=0.001),
    # the same, scaled behind the experts
    "beam": _v3((5120, 2560, 256, 8), _biased(groups=(8, 4)), shared=0, routed_scale=2.5),
    "minimax-m3-vl": _v3((6144, 3072, 128, 4), _biased(eps=0.0), routed_scale=2.0, activation="swiglu_oai", aux=0.001),
    "step3p7": _v3((4096, 1280, 288, 8), _biased(eps=0.0), routed_scale=3.0),
    "laguna": _v3((2048, 512, 256, 8), _biased(eps=0.0), aux=0.001),
    # a bias on the logits; shared experts that compete for weight; the square root of softplus; a table of choices
    "kolibri1": _v3((2560, 512, 384, 6), dict(score="sigmoid", order="pre", bias_on="logits")),
    "inkling": _v3((6144, 3072, 256, 6), _biased(8.0, eps=0.0, shared_logits=2), shared=2, learned_scale="global"),
    "deepseek-v4": _v3((4096, 2048, 256, 6), _V4, **_CLAMPED, aux=0.001),
    "deepseek-v4-hash": _row((4096, 2048, 256, 6), _V4, **_CLAMPED, num_shared_experts=1, hash_vocab_size=129280,
                             aux=0.001),
    # top-1 and top-2 with a capacity
    "switch-transformers": _row((768, 3072, 8, 1), dict(order="pre", **_SLOTS_64), activation="relu",
                                input_jitter=0.01, aux=0.001, z_loss_coef=0.001),
    # in evaluation every expert has room for all tokens; what a drop leaves of a token has weights of sum 1
    "nllb-moe": _row(
        (2048, 8192, 128, 2),
        dict(norm_min=2**-23, **_SLOTS_64, eval_capacity_factor=128.0, drop_policy="choice", renorm_after_drop=True),
        activation="relu", expert_bias=True, aux=0.001, z_loss_coef=0.001,
    ),
}  # fmt: skip
