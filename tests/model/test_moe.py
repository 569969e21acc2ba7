"""Routers against their definitions, written out token by token; experts against a loop; bad options."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from headrace.model.ffns.jitter import jittered
from headrace.model.ffns.moe import MoE, MoEConfig
from headrace.model.ffns.routing import Routing, move_bias
from headrace.model.sequence import LayerStates, SequenceContext, TrainingPass

D, B, L = 6, 3, 11


def build(**options: Any) -> MoE:
    moe = MoE(MoEConfig(**{"num_experts": 5, "top_k": 2, "d_hidden": 4, **options}), D, 0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return moe.double()


def draw_x(seed: int = 1) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed)).double()


def training(scale: float = 1.0, missing_rows: int = 0) -> TrainingPass:
    number = torch.arange(B * L).view(B, L)
    number[B - missing_rows :] = -1
    return TrainingPass(torch.tensor(scale, dtype=torch.float64), number)


def context(pass_: TrainingPass | None = None, reset: Tensor | None = None) -> SequenceContext:
    seq = SequenceContext(reset_BL=reset, training=pass_)
    seq.enter(B, L)
    return seq


def decide(moe: MoE, x: Tensor, pass_: TrainingPass | None = None, reset: Tensor | None = None) -> Routing:
    return moe.router(x.flatten(0, 1), context(pass_, reset))


def by_hand(moe: MoE, x_D: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The output of one token."""
    total = torch.zeros(D, dtype=torch.float64)
    for expert, weight in zip(experts.tolist(), weights, strict=True):
        up = moe.experts.up_proj[expert] @ x_D
        if moe.config.activation == "swiglu":
            up = F.silu(moe.experts.gate_proj[expert] @ x_D) * up
        elif moe.config.activation == "relu2":
            up = up.relu() ** 2
        else:
            up = F.gelu(up)
        total = total + weight * (moe.experts.down_proj[expert] @ up)
    return total


@pytest.mark.parametrize("activation", ["swiglu", "relu2", "gelu"])
@pytest.mark.parametrize("options", [{}, {"d_shared": 3}, {"top_k": 5, "renormalize": True}], ids=str)
def test_layer_equals_a_loop_over_tokens(activation: str, options: dict[str, Any]) -> None:
    moe, x = build(activation=activation, **options), draw_x()
    experts_Tk, weights_Tk = decide(moe, x)
    tokens = zip(x.flatten(0, 1), experts_Tk, weights_Tk, strict=True)
    expected = torch.stack([by_hand(moe, *token) for token in tokens]).view(B, L, D)
    if moe.shared is not None:
        expected = expected + moe.shared(x, context())
    torch.testing.assert_close(moe(x, context()), expected, rtol=1e-12, atol=1e-12)


@given(
    score=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 2), (6, 3)]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_choices_follow_the_definition(
    score: str, renormalize: bool, scale: float, groups: tuple[int, int], bias: bool, seed: int
) -> None:
    options = {"score": score, "renormalize": renormalize, "scale": scale, "balance": "bias" if bias else "none"}
    moe = build(num_experts=6, num_groups=groups[0], top_groups=groups[1], **options)
    x = draw_x(seed)
    experts_Tk, weights_Tk = decide(moe, x)
    for x_D, experts, weights in zip(x.flatten(0, 1), experts_Tk.tolist(), weights_Tk.tolist(), strict=True):
        logits = (moe.router.weight @ x_D).tolist()
        top = max(logits)
        exps = [math.exp(z - top) for z in logits]
        scores = [e / sum(exps) for e in exps] if score == "softmax" else [1 / (1 + math.exp(-z)) for z in logits]
        offset = moe.router.balance_bias.tolist() if bias else [0.0] * 6
        wish = [s + b for s, b in zip(scores, offset, strict=True)]
        size = 6 // groups[0]
        members = [list(range(g * size, (g + 1) * size)) for g in range(groups[0])]
        best = 2 if score == "sigmoid" else 1
        worth = [sum(sorted((wish[i] for i in group), reverse=True)[:best]) for group in members]
        chosen_groups = sorted(range(groups[0]), key=worth.__getitem__, reverse=True)[: groups[1]]
        allowed = [i for group in chosen_groups for i in members[group]]
        expected = sorted(allowed, key=lambda i: wish[i], reverse=True)[:2]
        assert experts == expected
        chosen = [scores[i] for i in expected]
        total = sum(chosen) if renormalize else 1.0
        assert weights == pytest.approx([scale * s / total for s in chosen], rel=1e-12)


@pytest.mark.parametrize("scope", ["row", "batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_losses_are_added_to_the_gradient(scope: str, score: str) -> None:
    """A pass whose output is not used has the gradient of the added losses alone, times the scale of the loss."""
    moe = build(score=score, balance_scope=scope, balance_loss=0.3, z_loss=0.2)
    x = draw_x().requires_grad_()
    weights_Tk = decide(moe, x, training(scale=0.7, missing_rows=1)).weights_Tk
    (weights_Tk * 0).sum().backward()
    found = moe.router.weight.grad, x.grad

    W, y = moe.router.weight.detach().requires_grad_(), x.detach().requires_grad_()
    logits = (y @ W.t())[: B - 1]
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    share = scores / scores.sum(-1, keepdim=True)
    chosen = F.one_hot(scores.topk(2, -1).indices, 5).sum(-2).double()
    if scope == "row":  # Switch, equation 4, of each row, times its tokens
        balance = sum(5 * (chosen[b].mean(0) / 2) @ share[b].mean(0) * L for b in range(B - 1))
    else:
        balance = 5 * (chosen.flatten(0, 1).mean(0) / 2) @ share.flatten(0, 1).mean(0) * L * (B - 1)
    z = (logits.exp().sum(-1).log() ** 2).sum()
    (0.7 * (0.3 * balance + 0.2 * z)).backward()
    torch.testing.assert_close(found[0], W.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], y.grad, rtol=1e-10, atol=1e-10)


def test_what_is_told_counts_real_tokens() -> None:
    moe, x = build(), draw_x()
    pass_ = training(missing_rows=2)
    experts_Tk = decide(moe, x, pass_).experts_Tk
    told = pass_.told[0]
    assert told[:5].tolist() == torch.bincount(experts_Tk[:L].flatten(), minlength=5).tolist()
    share = (x[0] @ moe.router.weight.detach().t()).softmax(-1)
    assert float(told[5]) == pytest.approx(float(-(share * share.log()).sum()))
    assert told[6:].tolist() == [L, 0]


def test_a_broken_router_is_told() -> None:
    moe, x = build(), draw_x()
    x[1, 3] = float("nan")
    pass_ = training()
    decide(moe, x, pass_)
    assert pass_.told[0][7] == 1


def test_sinkhorn_evens_the_load_in_training_alone() -> None:
    moe = build(balance="sinkhorn", score="sigmoid", top_k=1, sinkhorn_iterations=50)
    with torch.no_grad():
        moe.router.weight[0] *= 5
    x = draw_x()
    logits = x @ moe.router.weight.t()
    assert torch.equal(decide(moe, x).experts_Tk, logits.flatten(0, 1).topk(1).indices)
    rows = []
    for row in logits:  # alternating normalisation of tokens and experts
        plan = row.exp()
        for _ in range(200):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0) * L / 5
        rows.append(plan.argmax(1))
    found = decide(moe, x, training()).experts_Tk
    assert torch.equal(found.flatten(), torch.cat(rows))
    worst = lambda experts: torch.bincount(experts.flatten(), minlength=5).max()
    assert worst(found) < worst(decide(moe, x).experts_Tk)


def test_a_chunk_shares_the_decision_of_its_first_token() -> None:
    moe, x = build(chunk=4), draw_x()
    single = build()
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, [0, 5]] = True
    reset[1, 7] = True
    found, alone = decide(moe, x, reset=reset), decide(single, x)
    start = [0, 0, 0]
    for row in range(B):
        for place in range(L):
            if reset[row, place]:
                start[row] = place
            first = row * L + place - (place - start[row]) % 4
            assert torch.equal(found.experts_Tk[row * L + place], alone.experts_Tk[first])
            torch.testing.assert_close(found.weights_Tk[row * L + place], alone.weights_Tk[first])


def test_chunks_go_on_from_piece_to_piece() -> None:
    moe, x = build(chunk=4), draw_x()
    whole = moe(x, context())
    states, pieces = LayerStates(), []
    for start, stop in ((0, 3), (3, 4), (4, 11)):
        seq = SequenceContext(states=states)
        seq.enter(B, stop - start)
        pieces.append(moe(x[:, start:stop], seq))
        seq.advance(stop - start, x.device, B)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


def test_jitter_is_uniform_and_each_token_has_its_own() -> None:
    x = torch.ones(4000, 8, dtype=torch.float64)
    number = torch.randperm(4000, generator=torch.Generator().manual_seed(3))
    noise = jittered(x, 0.2, number, 5)
    assert noise.min() >= 0.8
    assert noise.max() <= 1.2
    assert float(noise.mean()) == pytest.approx(1, abs=0.003)
    assert float(noise.var()) == pytest.approx(0.4**2 / 12, rel=0.03)
    assert abs(float(torch.corrcoef(noise.t()).triu(1).abs().max())) < 0.07
    again = jittered(x[:100], 0.2, number[:100], 5)
    assert torch.equal(again, noise[:100])
    assert not torch.equal(jittered(x[:100], 0.2, number[:100], 6), again)


def test_the_bias_moves_towards_an_even_load() -> None:
    bias, load = torch.tensor([0.0, 0.5, -0.5]), torch.tensor([9.0, 3.0, 6.0])
    moved = move_bias(bias, load, 0.1, torch.zeros(()))
    assert moved.tolist() == pytest.approx([-0.1, 0.6, -0.5])
    assert torch.equal(move_bias(bias, load, 0.1, torch.ones(())), bias)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"top_k": 9}, "top_k=9 is above num_experts=8; lower it"),
        ({"num_groups": 3}, "num_groups=3 does not divide num_experts=8; use one of 1, 2, 4, 8"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups=3 is above num_groups=2; lower it"),
        ({"num_groups": 4, "top_k": 3}, "top_k=3 is above the 2 experts of top_groups=1; lower it"),
        ({"score": "tanh"}, "score='tanh' is unknown; use one of softmax, sigmoid"),
        ({"jitter": 1.0}, "jitter=1.0 must lie between 0 and 1; use 0 for none"),
        ({"d_shared": -1}, "d_shared=-1 must not be negative; use 0 or more"),
        ({"chunk": 0}, "chunk=0 must be at least 1; use a positive whole number"),
        ({"scale": 0.0}, "scale=0.0 must be above 0; use 1 for none"),
    ],
)
def test_bad_options(options: dict[str, Any], line: str) -> None:
    assert MoEConfig(**options).problems(16) == [line]


@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 0.1, "jitter": 0.1, "d_shared": 3},
        {
            "num_experts": 6,
            "score": "sigmoid",
            "balance": "bias",
            "num_groups": 3,
            "top_groups": 2,
            "renormalize": True,
        },
        {"balance": "sinkhorn", "top_k": 1, "chunk": 3, "balance_scope": "batch"},
    ],
    ids=str,
)
def test_the_host_waits_for_nothing(options: dict[str, Any]) -> None:
    """Tensors without values: whoever looked at one, to choose a shape or a path by it, would fail."""
    moe, pass_ = build(**options), training()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(draw_x()).requires_grad_()
        out = moe(x, context(pass_))
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
