"""Routers and experts against the stock transformers layers, and what is added to the loss against its formulas."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

import hf_models
from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.ffns.moe import MoE, MoEConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.presets import PRESETS
from headrace.model.sequence import SequenceContext, TrainingPass
from headrace.pretrain.hf import choose_stock_class, import_hf
from headrace.pretrain.hf.stock_folder import read_weights
from headrace.pretrain.hf.verify import load_stock_model

pytest.importorskip("transformers")
jamba = pytest.importorskip("transformers.models.jamba.modeling_jamba")


def stock_layer(layer, x_BLD):
    """What the experts of a stock layer make of an input, and the router's choices and weights."""
    if hasattr(layer, "block_sparse_moe"):
        block, router = layer.block_sparse_moe, layer.block_sparse_moe.router
        out_BLD = block(x_BLD) + layer.shared_mlp(x_BLD)
    elif hasattr(layer, "mixer"):
        block, router = layer.mixer, layer.mixer.gate
        out_BLD = block(x_BLD)
    else:
        block, router = layer.feed_forward, layer.feed_forward.router
        out_BLD = block(x_BLD)
    _, weights_Tk, experts_Tk = router(x_BLD.flatten(0, 1))
    return out_BLD, weights_Tk, experts_Tk


def by_expert(experts_Tk, weights_Tk):
    """Stock routers return their choices in no order."""
    order_Tk = experts_Tk.argsort(1)
    return experts_Tk.gather(1, order_Tk), weights_Tk.gather(1, order_Tk)


@pytest.mark.parametrize("case", hf_models.EXPERT_MODELS)
@pytest.mark.parametrize("seed", range(30, 36))
def test_choices_weights_and_outputs_equal_the_stock_layer(case, seed, tmp_path):
    model = hf_models.random_model(hf_models.config_of(case, seed), seed)
    stock = hf_models.stock_of(case)
    hf_models.write_folder(model, stock, tmp_path)
    layers = load_stock_model(tmp_path).model.layers
    generator = torch.Generator().manual_seed(seed)
    compared = 0
    for index, block in model.layers.items():
        if not isinstance(block.mixer, MoE):
            continue
        x_BLD = torch.randn(2, 25, model.config.d_model, generator=generator)
        seq = SequenceContext()
        seq.enter(2, 25)
        experts_Tk, weights_Tk = block.mixer.router(x_BLD.flatten(0, 1), seq)
        layer = layers[int(index) // 2 if stock.names.paired else int(index)]
        out_BLD, stock_weights_Tk, stock_experts_Tk = stock_layer(layer, x_BLD)
        experts_Tk, weights_Tk = by_expert(experts_Tk, weights_Tk)
        stock_experts_Tk, stock_weights_Tk = by_expert(stock_experts_Tk, stock_weights_Tk)
        assert torch.equal(experts_Tk, stock_experts_Tk)
        torch.testing.assert_close(weights_Tk, stock_weights_Tk, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(block.mixer(x_BLD, seq), out_BLD, atol=1e-5, rtol=1e-5)
        compared += 1
    assert compared


def routed(config, x_BLD, *, counts_B=None):
    """A router with drawn weights after a training pass: its weights' gradient of what is added, and the routing."""
    rows, length, width = x_BLD.shape
    moe = MoE(config, width, 0).double()
    with torch.no_grad():
        moe.router.weight.copy_(torch.randn(config.num_experts, width, generator=torch.Generator().manual_seed(1)))
    number_BL = torch.arange(rows * length).view(rows, length)
    if counts_B is not None:
        number_BL = number_BL.where(counts_B[:, None], -1)
    seq = SequenceContext(training=TrainingPass(torch.tensor(0.5, dtype=torch.float64), number_BL))
    seq.enter(rows, length)
    routing = moe.router(x_BLD.flatten(0, 1), seq)
    # The sum times zero: the rest of the gradient is that of what the router adds to the loss.
    (routing.weights_Tk.sum() * 0).backward()
    return moe.router.weight, routing


def tokens(rows=3, length=20, width=8, seed=0):
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_that_of_transformers(top_k):
    """Theirs sums an expert's share over the choices, `top_k` of an even load's one; ours is 1 then, of each token."""
    config = MoEConfig(num_experts=5, top_k=top_k, d_hidden=4, balance_scope="batch", balance_loss=0.3)
    x_BLD = tokens()
    weight, routing = routed(config, x_BLD)
    again = weight.detach().clone().requires_grad_()
    logits_TX = F.linear(x_BLD.flatten(0, 1), again)
    theirs = jamba.load_balancing_loss_func((logits_TX,), 5, top_k)
    (0.5 * 0.3 * logits_TX.shape[0] * theirs / top_k).backward()
    torch.testing.assert_close(weight.grad, again.grad, atol=1e-5, rtol=1e-5)  # theirs is float32
    assert weight.grad.abs().max() > 1e-3
    assert routing.experts_Tk.shape == (60, top_k)


def test_balance_loss_by_row_leaves_out_rows_that_fill_up():
    config = MoEConfig(num_experts=5, top_k=2, d_hidden=4, balance_scope="row", balance_loss=0.3)
    x_BLD = tokens()
    weight, _ = routed(config, x_BLD, counts_B=torch.tensor([True, False, True]))
    again = weight.detach().clone().requires_grad_()
    total = sum(
        jamba.load_balancing_loss_func((F.linear(x_BLD[row], again),), 5, 2) * x_BLD.shape[1] / 2 for row in (0, 2)
    )
    (0.5 * 0.3 * total).backward()
    torch.testing.assert_close(weight.grad, again.grad, atol=1e-5, rtol=1e-5)


def test_z_loss_is_the_mean_squared_log_partition():
    x_BLD = tokens()
    weight, _ = routed(MoEConfig(num_experts=5, d_hidden=4, balance="none", z_loss=0.2), x_BLD)
    again = weight.detach().clone().requires_grad_()
    (0.5 * 0.2 * F.linear(x_BLD.flatten(0, 1), again).exp().sum(1).log().pow(2).sum()).backward()
    torch.testing.assert_close(weight.grad, again.grad, atol=1e-10, rtol=1e-10)


def sinkhorn(logits_TX, iterations):
    """Rows to one, then columns to T / X, so many times, on the matrix itself."""
    plan_TX = logits_TX.exp()
    for _ in range(iterations):
        plan_TX = plan_TX / plan_TX.sum(1, keepdim=True)
        plan_TX = plan_TX * (plan_TX.shape[0] / plan_TX.shape[1] / plan_TX.sum(0, keepdim=True))
    return plan_TX


@pytest.mark.parametrize("scope", ["row", "batch"])
@pytest.mark.parametrize("iterations", [1, 8])
def test_sinkhorn_chooses_by_alternating_normalisation(scope, iterations):
    config = MoEConfig(num_experts=4, top_k=2, d_hidden=4, score="sigmoid", balance="sinkhorn", balance_scope=scope)
    config = dataclasses.replace(config, sinkhorn_iterations=iterations)
    x_BLD = tokens(rows=2, length=32) + 0.5  # an uneven load
    weight, (experts_Tk, weights_Tk) = routed(dataclasses.replace(config, z_loss=1e-9), x_BLD)
    logits_TX = F.linear(x_BLD.flatten(0, 1), weight.detach())
    parts = logits_TX.split(32) if scope == "row" else [logits_TX]
    plan_TX = torch.cat([sinkhorn(part, iterations) for part in parts])
    assert torch.equal(experts_Tk, plan_TX.topk(2).indices)
    torch.testing.assert_close(weights_Tk, logits_TX.sigmoid().gather(1, experts_Tk), atol=1e-12, rtol=1e-12)
    greedy = torch.bincount(logits_TX.topk(1).indices.flatten(), minlength=4)
    evened = torch.bincount(experts_Tk[:, 0], minlength=4)
    if iterations == 8:
        assert evened.max() < greedy.max()


def test_jitter_is_uniform_and_in_training_only():
    width = 0.25
    x_BLD = torch.ones(4, 64, 8, dtype=torch.float64)
    config = MoEConfig(num_experts=8, d_hidden=4, balance="none", jitter=width, z_loss=1e-9, score="sigmoid", top_k=8)
    moe = MoE(config, 8, 3).double()
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(8))

    def noise(training):
        seq = SequenceContext(training=training)
        seq.enter(4, 64)
        experts_Tk, weights_Tk = moe.router(x_BLD.flatten(0, 1), seq)
        return weights_Tk.logit().gather(1, experts_Tk.argsort(1)).detach()

    assert torch.allclose(noise(None), torch.ones(256, 8, dtype=torch.float64))
    number_BL = torch.arange(256).view(4, 64)
    drawn = noise(TrainingPass(torch.tensor(1.0), number_BL))
    assert torch.equal(drawn, noise(TrainingPass(torch.tensor(1.0), number_BL)))
    assert not torch.equal(drawn, noise(TrainingPass(torch.tensor(1.0), number_BL + 256)))
    assert 1 - width <= drawn.min() < 1 - 0.98 * width
    assert 1 + 0.98 * width < drawn.max() <= 1 + width
    # Of 2048 uniform numbers: mean, variance, and the correlation of neighbours, each within five deviations.
    assert abs(drawn.mean() - 1) < 5 * width / (3 * 2048) ** 0.5
    assert drawn.var() == pytest.approx(width**2 / 3, rel=0.1)
    centred = drawn - 1
    for neighbours in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(neighbours.mean()) < 5 * width**2 / 3 / neighbours.numel() ** 0.5


SIZES = {"vocab_size": 61, "d_model": 16, "mamba2": Mamba2Config(head_dim=8, d_state=8)}
NEMOTRON = MoEConfig(d_hidden=12, score="sigmoid", activation="relu2", balance="bias", d_shared=8)
GRANITE = MoEConfig(d_hidden=12, renormalize=True)
JAMBA = MoEConfig(d_hidden=12)


def with_moe(pattern, moe, **changes):
    norms = Mamba1Config(d_state=4, inner_norms=True)
    return ModelConfig(**SIZES, pattern=pattern, mamba1=norms, moe=dataclasses.replace(moe, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_moe("mamba2 moe mamba2", NEMOTRON, chunk=4), "NemotronH.*moe.chunk=4 .use 1"),
        (with_moe("mamba2 moe mamba2", NEMOTRON, score="softmax"), 'NemotronH.*moe.score="softmax" .use "sigmoid"'),
        (
            with_moe("mamba2 moe mamba2", NEMOTRON, activation="swiglu"),
            'moe.activation="swiglu" .use "relu2" or "gelu"',
        ),
        (
            with_moe("mamba2 moe mamba2", NEMOTRON, num_groups=8, top_groups=2),
            "NemotronH.*moe.num_groups=8 of num_experts=8",
        ),
        (with_moe("mamba2 moe", GRANITE, scale=2.0), "Granite.*moe.scale=2.0 .use 1"),
        (with_moe("mamba2 moe", GRANITE, renormalize=False), "Granite.*moe.renormalize=false .use true"),
        (with_moe("mamba2 moe", GRANITE, balance="bias"), 'Granite.*moe.balance="bias" .use "loss"'),
        (with_moe("mamba2 moe", GRANITE, num_groups=2), "Granite.*moe.num_groups=2 .use 1"),
        (with_moe("mamba2 moe mamba2 mlp", GRANITE), "Granite.*mlp layers beside moe layers"),
        (with_moe("mamba1 moe", JAMBA, d_shared=4), "Jamba.*moe.d_shared=4 .use 0"),
        (with_moe("mamba1 moe mamba1 mlp", JAMBA), "Jamba.*model.mlp.d_hidden=64 beside model.moe.d_hidden=12"),
        (with_moe("2*(mamba1 moe) mamba1 mlp", JAMBA), "Jamba.*moe layers of model.pattern=.*give them a period"),
        (PRESETS["moe-mamba-25m"], 'Jamba.*inner_norms=false .use true.*activation="gelu" .use "swiglu"'),
        (PRESETS["blackmamba-1.5b"], 'Jamba.*inner_norms=false .use true.*score="sigmoid" .use "softmax"'),
    ],
)
def test_what_no_stock_class_computes_is_refused_with_what_to_change(config, message):
    assert config.problems() == []
    with pytest.raises(UserError, match=message):
        choose_stock_class(config)


def test_experts_without_a_balance_bias_or_shared_expert_are_exported_as_zeros(tmp_path):
    """NemotronH always has both; the bias comes back as one of zeros, and the shared expert not at all."""
    config = with_moe("mamba2 moe mamba2 moe", NEMOTRON, balance="sinkhorn", d_shared=0)
    model = hf_models.random_model(config, 3)
    hf_models.write_folder(model, choose_stock_class(config), tmp_path)
    tokens_BL = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits_BLV = load_stock_model(tmp_path)(tokens_BL).logits
        torch.testing.assert_close(model(tokens_BL), logits_BLV, atol=1e-4, rtol=1e-4)
    again, weights = import_hf(tmp_path)
    biases = {f"layers.{index}.mixer.router.balance_bias" for index in (1, 3)}
    assert weights.keys() - dict(model.named_parameters()).keys() == biases
    assert not any(weights[name].any() for name in biases)
    assert (again.moe.d_shared, again.moe.balance) == (0, "bias")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "moe_latent_size": 8}))
    with pytest.raises(UserError, match="moe_latent_size=8"):
        import_hf(tmp_path)


def test_experts_lie_apart_as_on_the_hub(tmp_path):
    model = hf_models.random_model(with_moe("moe mamba2", NEMOTRON), 1)
    hf_models.write_folder(model, choose_stock_class(model.config), tmp_path)
    written = read_weights(tmp_path)
    up_XFD = model.layers["0"].mixer.experts.up_proj
    for expert in range(8):
        assert torch.equal(written[f"backbone.layers.0.mixer.experts.{expert}.up_proj.weight"], up_XFD[expert])
