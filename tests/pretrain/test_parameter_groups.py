"""Which optimizer, learning rate and decay each parameter gets."""

from pathlib import Path

import pytest
import torch

from headrace.errors import UserError
from headrace.model.lm import HybridLM
from headrace.pretrain.config import Config, load_config
from headrace.pretrain.optimizers.adamw import AdamW
from headrace.pretrain.optimizers.adamw_8bit import AdamW8bit
from headrace.pretrain.optimizers.build import build_optimizers, check_parameters
from headrace.pretrain.optimizers.muon import Muon
from headrace.pretrain.optimizers.size import state_size
from tiny import tiny_config

GROUPS = 'optimizer.groups=[{names="*.out_proj.*", lr_scale=0.5}, {names="layers.*.norm.weight", weight_decay=0.3}]'
LR = 0.01


def moved(config: Config) -> dict[str, torch.Tensor]:
    """How far the first update takes each parameter that begins as ones with a gradient of ones."""
    model = HybridLM(config.model)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    for optimizer in build_optimizers([model], config.optimizer):
        optimizer.step(1.0, torch.zeros(()))
    return {name: 1.0 - parameter.detach() for name, parameter in model.named_parameters()}


def test_groups_set_learning_rate_and_decay(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, "optimizer.kind=adamw", f"optimizer.lr={LR}", GROUPS)
    for name, distance in moved(config).items():
        lr = 0.5 * LR if ".out_proj." in name else LR
        if name.startswith("layers.") and name.endswith(".norm.weight"):
            decay = 0.3
        else:
            decay = 0.1 if distance.ndim >= 2 else 0.0
        expected = torch.full_like(distance, lr * (1.0 + decay))
        torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-7, msg=name)


def test_groups_survive_the_record(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, GROUPS)
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config
    assert len(config.optimizer.groups) == 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[{names='*', lr_scale=-1}]", "lr_scale=-1.0 must be finite and not negative"),
        ("[{names='*', weight_decay=inf}]", "weight_decay=inf must be finite"),
        ("[{lr_scale=1}]", r"missing key optimizer.groups\[0\].names"),
        ("[{names='*', lr=1}]", r"unknown key optimizer.groups\[0\].lr; known keys: lr_scale"),
    ],
)
def test_bad_groups(tmp_path: Path, groups: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, tmp_path, f"optimizer.groups={groups}")


def test_a_group_of_nothing_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, "optimizer.groups=[{names='*.in_proj.*'}]")
    with torch.device("meta"):
        model = HybridLM(config.model)
    with pytest.raises(UserError, match=r"names='\*.in_proj.\*' matches no parameter; they are named like 'layers.0"):
        check_parameters(config.optimizer, model)


def test_what_keeps_32_bits(tmp_path: Path) -> None:
    """Matrices of some size have 8-bit moments, the embedding where asked for, all else never."""
    eight = ("optimizer.kind=adamw", "optimizer.state_bits=8", "model.d_model=64", "model.mlp.d_hidden=128")
    sizes = {}
    for more in ((), ("optimizer.embedding_bits=8",)):
        config = tiny_config(tmp_path, tmp_path, *eight, *more)
        model = HybridLM(config.model)
        wide, narrow = build_optimizers([model], config.optimizer)
        assert isinstance(wide, AdamW)
        assert isinstance(narrow, AdamW8bit)
        kinds = model.parameter_kinds()
        assert {kinds[name] for name in narrow.parts} == {"matrix"} | ({"embedding"} if more else set())
        assert all(part.cut.parameter.numel() >= 4096 for part in narrow.parts.values())
        assert "layers.0.mixer.in_dt.weight" in wide.parameters  # a small matrix
        assert wide.parameters.keys() | narrow.parts.keys() == dict(model.named_parameters()).keys()
        sizes[more] = state_size([wide, narrow]).whole
    embedding = 320 * 64
    assert sizes[()] - sizes["optimizer.embedding_bits=8",] == 8 * embedding - 2 * (embedding + 4 * 320)


def test_muon_takes_the_matrices_and_adamw_the_rest_in_8_bits(tmp_path: Path) -> None:
    eight = ("optimizer.state_bits=8", "optimizer.embedding_bits=8")
    config = tiny_config(tmp_path, tmp_path, *eight)
    kinds = [type(optimizer) for optimizer in build_optimizers([HybridLM(config.model)], config.optimizer)]
    assert kinds == [AdamW, AdamW8bit, Muon]
