"""BiasBalancer and the callback for transformers: what is counted, what the step does, and that loads become even."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers", minversion="5.17")

import transformers
from hf_models import BASE, IDS, MODELS
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from moesaic import route
from moesaic.integrations.balance import BiasBalancingCallback, bias_balancer
from moesaic.nn import BiasBalancer, MoE, MoEConfig

E, K, H = 8, 2, 16
CONFIG = MoEConfig.preset(
    "deepseek-v3", hidden_size=H, intermediate_size=8, num_experts=E, top_k=K, num_groups=1, topk_groups=1
)


def layer(seed: int = 0, **changes) -> MoE:
    torch.manual_seed(seed)
    return MoE(CONFIG.replace(**changes))


def tokens(T: int = 64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=g) + torch.randn(H, generator=torch.Generator().manual_seed(99))


def max_over_mean(load: torch.Tensor) -> float:
    return (load.max() * load.numel() / load.sum()).item()


# ---------------------------------------------------------------- the step
def test_sign_rule_is_megatrons():
    """`bias + rate · sign(mean - n)`, written out; an expert at the mean stays."""
    bias, n = torch.tensor([0.5, 0, 0, -0.5]), [6, 1, 3, 2]
    ids = torch.tensor([e for e, count in enumerate(n) for _ in range(count)]).view(-1, 2)
    balancer = BiasBalancer(rate=0.01, centre=False)
    balancer.observe(bias, ids)
    balancer.step()
    torch.testing.assert_close(bias, torch.tensor([0.49, 0.01, 0, -0.49]))
    assert balancer.loads["observed.0"].tolist() == n


def test_centring_keeps_the_mean():
    bias = torch.tensor([0.25, 0, 0, 0])
    balancer = BiasBalancer(rate=0.01)
    for _ in range(3):
        balancer.observe(bias, torch.tensor([[0, 1], [0, 0]]))
        balancer.step()
    # each step: +-0.01 less their mean, 0.005
    step = torch.tensor([-0.01, 0.0, 0.01, 0.01]) - 0.0025
    torch.testing.assert_close(bias, torch.tensor([0.25, 0, 0, 0]) + 3 * step)
    assert bias.mean().item() == pytest.approx(0.0625)


def test_proportional_rule():
    bias = torch.zeros(4)
    balancer = BiasBalancer(rate=0.1, rule="proportional", centre=False)
    balancer.observe(bias, torch.tensor([[0, 1], [0, 2], [0, -1]]))
    balancer.step()
    torch.testing.assert_close(bias, 0.1 * (1.25 - torch.tensor([3.0, 1, 1, 0])) / 1.25)


def test_without_choices_nothing_moves():
    moe = layer()
    balancer = BiasBalancer(moe)
    balancer.step()
    assert (moe.gate.e_score_correction_bias == 0).all() and balancer.unseen == ["gate"]
    moe(tokens(0)).sum().backward()
    balancer.step()
    assert (moe.gate.e_score_correction_bias == 0).all() and not balancer.unseen


def test_bad_input():
    with pytest.raises(ValueError, match="rule must be one of"):
        BiasBalancer(rule="cosine")
    with pytest.raises(ValueError, match="rate must be at least 0"):
        BiasBalancer(rate=-1.0)
    with pytest.raises(ValueError, match=r"set MoEConfig\.selection_bias"):
        BiasBalancer(layer(selection_bias=False))
    balancer = BiasBalancer(moe := layer())
    with pytest.raises(ValueError, match="name must be new"):
        balancer.watch("gate", moe.gate)


# ---------------------------------------------------------------- what is counted
def test_micro_batches_add_up_and_evaluation_does_not():
    moe = layer()
    balancer = BiasBalancer(nn.ModuleDict({"first": moe}))
    want = torch.zeros(E, dtype=torch.int64)
    for seed in range(3):
        moe(tokens(seed=seed)).sum().backward()
        want += moe.routing.choices.sum(0)
    moe.eval()
    moe(tokens(seed=7))
    moe.train()
    balancer.step()
    assert torch.equal(balancer.loads["first.gate"], want) and want.sum() == 3 * 64 * K
    bias = moe.gate.e_score_correction_bias
    want_bias = 1e-3 * torch.sign(want.float().mean() - want)
    torch.testing.assert_close(bias, want_bias - want_bias.mean())
    balancer.step()
    assert balancer.loads["first.gate"].sum() == 0, "counts start anew at each step"


def test_choices_that_a_capacity_drops_are_counted():
    logits, bias = torch.randn(64, E, requires_grad=True), torch.zeros(E)
    r = route(logits, top_k=K, bias=bias, capacity_factor=0.25, training=True)
    balancer = BiasBalancer()
    balancer.observe(bias, r)
    balancer.step()
    assert balancer.loads["observed.0"].sum() == 64 * K > r.tokens_per_expert.sum()


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("whole", (True, False), ids=("model", "layers"))
def test_recomputation_is_not_counted(reentrant, whole):
    model = nn.Sequential(layer(0), layer(1))
    balancer = BiasBalancer(model)
    x = tokens().requires_grad_()
    ran = []
    for m in model:
        m.gate.register_forward_hook(lambda *_: ran.append(1))
    for _ in range(2):
        if whole:
            y = checkpoint(model, x, use_reentrant=reentrant)
        else:
            y = x
            for m in model:
                y = checkpoint(m, y, use_reentrant=reentrant)
        y.sum().backward()
    assert len(ran) == 8, "both layers must have run twice, twice"
    balancer.step()
    assert [n.sum().item() for n in balancer.loads.values()] == [2 * 64 * K] * 2


def test_observing_inside_a_checkpoint_counts_once():
    w, bias, balancer = torch.randn(E, H, requires_grad=True), torch.zeros(E), BiasBalancer()

    def forward(x):
        r = route(x @ w.T, top_k=K, bias=bias)
        balancer.observe(bias, r)
        return r.topk_weights.square().sum()

    checkpoint(forward, tokens(), use_reentrant=False).backward()
    balancer.step()
    assert balancer.loads["observed.0"].sum() == 64 * K


def test_compiled_in_one_graph():
    moe = layer()
    balancer = BiasBalancer(moe)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for want in (2, 3):
        for seed in range(want):
            compiled(tokens(seed=seed)).sum().backward()
        balancer.step()
        assert balancer.loads["gate"].sum() == want * 64 * K


def test_copies_pickles_and_moves():
    moe = layer()
    balancer = BiasBalancer(moe)
    twin = copy.deepcopy(moe)
    twin(tokens())
    again = pickle.loads(pickle.dumps(moe))
    again(tokens())
    assert balancer.unseen == ["gate"], "a copy must not count for its original"
    moe.to(torch.float64)  # buffers are made anew
    moe(tokens().double()).sum().backward()
    balancer.step()
    assert moe.gate.e_score_correction_bias.abs().max() > 0
    balancer.remove()
    moe(tokens().double())
    balancer.step()
    assert balancer.loads["gate"].sum() == 0


def test_state_goes_on_where_it_stopped():
    moe, x = layer(), tokens()
    balancer = BiasBalancer(moe, rate=0.5, rule="proportional", centre=False)
    moe(x)
    state = balancer.state_dict()
    fresh = BiasBalancer(other := layer())
    fresh.load_state_dict(state)
    for b in (balancer, fresh):
        b.step()
    torch.testing.assert_close(other.gate.e_score_correction_bias, moe.gate.e_score_correction_bias)
    bias, once, later = torch.zeros(E), BiasBalancer(), BiasBalancer()
    once.observe(bias, torch.tensor([[0, 1]]))
    later.load_state_dict(once.state_dict())
    later.observe(bias, torch.tensor([[0, 2]]))
    later.step()
    assert later.loads["observed.0"].tolist()[:3] == [2, 1, 1]


# ---------------------------------------------------------------- several ranks
def _rank(rank: int, file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.Sequential(layer(0), layer(1))
    balancer = BiasBalancer(model, group=dist.group.WORLD)
    if rank == 0:  # the other rank has no tokens in this step
        model(tokens(seed=0)).sum().backward()
    balancer.step()
    first = balancer.loads
    model(tokens(seed=rank)).sum().backward()
    balancer.step()
    torch.save((first, balancer.loads, [m.gate.e_score_correction_bias for m in model]), f"{out}.{rank}")
    dist.destroy_process_group()


def test_ranks_take_the_same_step(tmp_path):
    mp.spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    model = nn.Sequential(layer(0), layer(1))
    alone = BiasBalancer(model)
    for seeds, loads in zip(((0,), (0, 1)), ranks[0][:2], strict=True):
        for seed in seeds:
            model(tokens(seed=seed)).sum().backward()
        alone.step()
        torch.testing.assert_close(loads, alone.loads, rtol=0, atol=0)
    torch.testing.assert_close(ranks[0][2], [m.gate.e_score_correction_bias for m in model], rtol=0, atol=0)


# ---------------------------------------------------------------- it balances
@pytest.mark.parametrize("rule, rate", (("sign", 0.005), ("proportional", 0.05)))
def test_balances_a_router_that_never_learns(rule, rate):
    w, bias = torch.randn(E, H, generator=torch.Generator().manual_seed(1)) / 4, torch.zeros(E)
    balancer = BiasBalancer(rate=rate, rule=rule)
    loads = []
    for step in range(120):
        r = route(tokens(1024, seed=step) @ w.T, top_k=K, score="sigmoid", bias=bias)
        balancer.observe(bias, r)
        loads.append(max_over_mean(r.tokens_per_expert))
        balancer.step()
    assert loads[0] > 1.5 and sum(loads[-10:]) / 10 < 1.2
    assert abs(bias.mean().item()) < 1e-6


# ---------------------------------------------------------------- transformers
LFM2 = dict(
    num_experts=8, moe_intermediate_size=32, intermediate_size=64, num_dense_layers=0, use_expert_bias=True,
    layer_types=["full_attention", "full_attention"],
)  # fmt: skip
SMALL = {**MODELS, "deepseek_v3": dict(MODELS["deepseek_v3"], n_group=4, topk_group=2, num_experts_per_tok=K),
         "lfm2_moe": LFM2}  # fmt: skip


def small(name: str) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(name, **{**BASE, **SMALL[name]})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for router in routers(model):
            router.weight.normal_(0, 0.2)  # as initialised every expert is chosen alike
    return model


def handler(callback, model):
    """The Trainer's own dispatcher of events, without the Trainer."""
    return CallbackHandler([DefaultFlowCallback(), callback], model, None, None, None)


def routers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


class Chosen:
    """What the routers of a model return, counted independently."""

    def __init__(self, model: nn.Module):
        self.counts = [torch.zeros(E, dtype=torch.int64) for _ in routers(model)]
        for n, router in zip(self.counts, routers(model), strict=True):
            router.register_forward_hook(functools.partial(self._add, n))

    @staticmethod
    def _add(n, module, args, output) -> None:
        n += output[2].reshape(-1).bincount(minlength=E)

    def take(self) -> list[list[int]]:
        out = [n.tolist() for n in self.counts]
        for n in self.counts:
            n.zero_()
        return out


@pytest.mark.parametrize("name", ("deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "dots1", "lfm2_moe"))
def test_choices_of_every_kind_of_router_are_seen(name):
    model = small(name).train()
    chosen, balancer = Chosen(model), bias_balancer(model)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    balancer.step()
    assert routers(model) and not balancer.unseen
    assert [n.tolist() for n in balancer.loads.values()] == chosen.take()
    moved = [b for n, b in (*model.named_buffers(), *model.named_parameters()) if n in balancer.loads]
    assert len(moved) == len(balancer.loads) and all(b.abs().max() > 0 for b in moved)


@pytest.mark.parametrize("name", ("deepseek_v3", "glm4_moe"))
def test_the_callback_evens_the_loads(name):
    model = small(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    callback, chosen, loads = BiasBalancingCallback(rate=0.005), Chosen(model), []
    callback.on_train_begin(None, None, None, model=model)
    for _ in range(50):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step_end(None, None, None, model=model)
        loads.append(max(max_over_mean(torch.tensor(n)) for n in chosen.take()))
    callback.on_train_end(None, None, None, model=model)
    assert callback.balancer is None
    assert min(loads[:5]) > 1.8 and sum(loads[-5:]) / 5 < 1.45, loads


def test_gradient_checkpointing_and_accumulation_and_evaluation():
    model = small("glm4_moe").train()
    model.gradient_checkpointing_enable()
    callback = BiasBalancingCallback()
    callback.on_train_begin(None, None, None, model=model)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    model(input_ids=IDS)
    callback.on_step_end(None, None, None, model=model)
    assert [n.sum().item() for n in callback.balancer.loads.values()] == [2 * IDS.numel() * 2]


def test_the_trainers_dispatcher_passes_the_model():
    model = small("glm4_moe").train()
    callback = BiasBalancingCallback()
    events = handler(callback, model)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    off = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "no")
    args = SimpleNamespace(logging_first_step=False, logging_steps=0, eval_steps=0, save_steps=0, **off)
    state.max_steps = 10
    events.on_train_begin(args, state, control)
    model(input_ids=IDS, labels=IDS).loss.backward()
    events.on_step_end(args, state, control)
    assert callback.balancer.loads["model.layers.1.mlp.gate.e_score_correction_bias"].sum() == IDS.numel() * 2
    events.on_train_end(args, state, control)


class LogitsOnly(nn.Module):
    """A router that returns its logits alone, below a block that holds the bias; H = E invites confusion."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(E, E, bias=False)
        self.e_score_correction_bias = nn.Buffer(torch.zeros(E))

    def forward(self, x):
        return x * self.gate(x.view(-1, E)).sigmoid().sum(-1).view(x.shape[0], x.shape[1], 1)


def test_a_router_of_logits_alone():
    torch.manual_seed(0)
    model = nn.Sequential(LogitsOnly())
    model.config = transformers.PretrainedConfig(num_experts_per_tok=K, n_group=4, topk_group=2)
    balancer = bias_balancer(model, rate=0.1)
    x = torch.randn(2, 24, E)
    for _ in range(2):
        bias = model[0].e_score_correction_bias.clone()
        logits = x.view(-1, E) @ model[0].gate.weight.T
        groups = dict(num_groups=4, topk_groups=2, group_mask_value=0.0)
        want = route(logits, top_k=K, score="sigmoid", bias=bias, **groups)
        model(x)
        balancer.step()
        assert torch.equal(*balancer.loads.values(), want.tokens_per_expert.long())


def test_a_layer_that_does_not_run_is_named_once():
    model = nn.ModuleList([LogitsOnly()]).train()
    model.config = transformers.PretrainedConfig(num_experts_per_tok=K)
    callback = BiasBalancingCallback()
    callback.on_train_begin(None, None, None, model=model)
    with pytest.warns(UserWarning, match=r"no choices were seen in this step for 0\.e_score_correction_bias"):
        callback.on_step_end(None, None, None)
    callback.on_step_end(None, None, None)


def test_models_without_a_selection_bias_are_refused():
    with pytest.raises(ValueError, match="must have a selection bias"):
        bias_balancer(small("mixtral"))
    with pytest.raises(ValueError, match="rule must be one of"):
        BiasBalancingCallback(rule="cosine")


def test_without_transformers_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import moesaic\n"
        "try:\n    import moesaic.integrations.balance\n"
        "except moesaic.MissingExtra as e:\n    print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "moesaic[hf]"' in out
