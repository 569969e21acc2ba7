"""The language model as a whole: losses and logits, dtypes, recomputation, and rules that are missing."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from headrace.errors import UserError
from headrace.model import HybridLM, ModelConfig, SequenceContext
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.rules import collect_rules

Build = Callable[..., HybridLM]


def draw_batch(model: HybridLM) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(model.config.vocab_size, (2, 2, 33), generator=generator)
    targets[0, :5] = -100
    return tokens, targets


@pytest.mark.parametrize("name", ["hybrid", "mamba2"])
def test_loss_is_the_cross_entropy_of_the_logits(name: str, small_models: dict[str, ModelConfig], build: Build) -> None:
    model = build(small_models[name])
    tokens, targets = draw_batch(model)
    logits = model(tokens)
    loss, count = model(tokens, None, targets)
    assert count == 2 * 33 - 5
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(tokens, last_only=True), logits[:, -1:])


def test_tied_head_is_the_embedding(small_models: dict[str, ModelConfig], build: Build) -> None:
    names = set(build(small_models["mamba2"]).state_dict())
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in build(small_models["hybrid"]).state_dict()


@pytest.mark.parametrize("wide", [True, False])
def test_residual_stream_dtype(wide: bool, small_models: dict[str, ModelConfig], build: Build) -> None:
    config = ModelConfig(
        vocab_size=17, d_model=16, pattern="2*mamba2", mamba2=Mamba2Config(head_dim=8), residual_in_fp32=wide
    )
    model = build(config, torch.bfloat16)
    seen: list[torch.dtype] = []
    for layer in model.layers.values():
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
        layer.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    logits = model(torch.zeros(1, 4, dtype=torch.long))
    stream = torch.float32 if wide else torch.bfloat16
    assert seen == [torch.bfloat16, stream] * 2
    assert logits.dtype == torch.float32


def test_blocks_can_be_recomputed(small_models: dict[str, ModelConfig], build: Build) -> None:
    model = build(small_models["hybrid"])
    tokens, targets = draw_batch(model)
    reset = torch.rand(2, 33, generator=torch.Generator().manual_seed(1)) < 0.1
    model(tokens, SequenceContext(reset), targets)[0].backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for layer in model.layers.values():
        layer.forward = lambda *inputs, plain=layer.forward: checkpoint(plain, *inputs, use_reentrant=False)
    model(tokens, SequenceContext(reset), targets)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)


def test_a_context_serves_one_pass(small_models: dict[str, ModelConfig], build: Build) -> None:
    model, seq = build(small_models["mamba2"]), SequenceContext()
    model(torch.zeros(1, 4, dtype=torch.long), seq)
    with pytest.raises(ValueError, match="one forward pass"):
        model(torch.zeros(1, 4, dtype=torch.long), seq)


def test_a_parameter_without_a_rule_is_named() -> None:
    model = HybridLM(ModelConfig(vocab_size=8, d_model=8, pattern="mlp"))
    model.layers["0"].mixer.extra = torch.nn.Parameter(torch.zeros(2))
    model.register_buffer("table", torch.zeros(2))
    with pytest.raises(ValueError, match=r"buffer table, parameter layers\.0\.mixer\.extra"):
        collect_rules(model)


def test_values_depend_on_name_seed_and_shape_only() -> None:
    def values(pattern: str) -> dict[str, torch.Tensor]:
        return dict(HybridLM(ModelConfig(vocab_size=8, d_model=8, pattern=pattern)).initial_values(0))

    one, other = values("mlp mlp"), values("mlp attention")
    assert torch.equal(one["layers.0.mixer.up_proj.weight"], other["layers.0.mixer.up_proj.weight"])
    assert not torch.equal(one["layers.0.mixer.up_proj.weight"], one["layers.1.mixer.up_proj.weight"])
    # A fixed number: another machine, or a change of the scheme, would show here.
    assert one["embed.weight"][0, 0].item() == pytest.approx(0.009152090176939964, rel=1e-6)


def test_wrong_configurations_are_refused_in_one_line() -> None:
    with pytest.raises(UserError) as error:
        HybridLM(ModelConfig(vocab_size=8, d_model=8, pattern="mamba2", norm_eps=0.0, mamba2=Mamba2Config(d_conv=0)))
    assert "norm_eps=0.0" in str(error.value)
    assert "mamba2.d_conv=0" in str(error.value)
    assert "\n" not in str(error.value)


def test_residual_matrices_shrink_with_the_number_of_layers() -> None:
    model = HybridLM(ModelConfig(vocab_size=8, d_model=64, pattern="16*mlp"))
    values = dict(model.initial_values(0))
    hidden = values["layers.3.mixer.down_proj.weight"].shape[1]
    assert values["layers.3.mixer.down_proj.weight"].abs().max().item() == pytest.approx(hidden**-0.5 / 4, rel=0.01)
    assert values["embed.weight"].std().item() == pytest.approx(0.02, rel=0.1)
