"""Whole models with random options compute what the stock transformers classes do: logits and gradients."""

import random

import pytest
import torch
from torch.nn import functional as F

import hf_models
from headrace.model.sequence import SequenceContext
from headrace.pretrain.hf.import_model import published_name
from headrace.pretrain.hf.mapping import joins
from headrace.pretrain.hf.verify import load_stock_model

pytest.importorskip("transformers")
from transformers.core_model_loading import revert_weight_conversion

TOLERANCE = 1e-4
MODEL_TYPES = [*hf_models.MODEL_TYPES, *hf_models.EXPERT_MODELS]
CASES = [(model_type, seed) for model_type in MODEL_TYPES for seed in range(10 if model_type != "jamba" else 3)]


def build(model_type, seed, folder):
    """The same random model as ours and as the stock class."""
    model = hf_models.random_model(hf_models.config_of(model_type, seed), seed)
    stock = hf_models.stock_of(model_type)
    assert stock.problems(model.config) == []
    hf_models.write_folder(model, stock, folder)
    return model, load_stock_model(folder)


def stock_gradients(model, stock_model, model_type):
    """The stock model's gradients under our parameters' names, by way of the names it saves."""
    names = hf_models.stock_of(model_type).names
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    internal = {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in stock_model.named_parameters()
    }
    saved = revert_weight_conversion(stock_model, internal)
    grads = {published_name(name, names): grad for name, grad in saved.items()}
    ours = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for join in joins(names, model.config, shapes):
        if join.copy:  # The stock class cannot tie: our one gradient is the sum of its two.
            ours["embed.weight"] += grads[join.stock]
        elif join.ours and model.get_parameter(join.ours[0]).requires_grad:
            join.from_stock(grads[join.stock], ours)
    return ours


def check_gradients(model, stock_model, model_type):
    theirs = stock_gradients(model, stock_model, model_type)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = max(1.0, float(theirs[name].abs().max()))
        difference = float((parameter.grad - theirs[name]).abs().max()) / scale
        assert difference < TOLERANCE, f"gradient of {name}: {difference:.2e} of {scale:.2e}"


@pytest.mark.parametrize(("model_type", "seed"), CASES)
def test_logits_and_gradients_equal_the_stock_class(model_type, seed, tmp_path):
    model, stock_model = build(model_type, seed, tmp_path)
    rng = torch.Generator().manual_seed(seed)
    length = random.Random(seed).choice([1, 2, 17, 40, 64])
    tokens_BL = torch.randint(0, hf_models.VOCAB, (2, length), generator=rng)
    targets_BL = torch.randint(0, hf_models.VOCAB, (2, length), generator=rng)

    logits_BLV = stock_model(tokens_BL, use_cache=False).logits
    torch.testing.assert_close(model(tokens_BL), logits_BLV, atol=TOLERANCE, rtol=TOLERANCE)

    F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum").backward()
    loss, count = model(tokens_BL, None, targets_BL)
    loss.backward()
    assert int(count) == 2 * length
    check_gradients(model, stock_model, model_type)


@pytest.mark.parametrize(
    ("model_type", "seed"), [(model_type, seed) for model_type in MODEL_TYPES for seed in (20, 21)]
)
def test_packed_documents_equal_the_stock_class_document_by_document(model_type, seed, tmp_path):
    """The stock classes know no documents, so each runs on its own; gradients add up."""
    model, stock_model = build(model_type, seed, tmp_path)
    rng = torch.Generator().manual_seed(seed)
    lengths = random.Random(seed).choice([[1, 30, 2, 1, 20], [13, 13, 28], [3, 1, 1, 59]])
    tokens_BL = torch.randint(0, hf_models.VOCAB, (1, sum(lengths)), generator=rng)
    reset_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    targets, stock_logits = [], []
    start = 0
    for length in lengths:
        reset_BL[0, start] = True
        document = tokens_BL[:, start : start + length]
        start += length
        targets.append(F.pad(document[:, 1:], (0, 1), value=-100))
        stock_logits.append(stock_model(document, use_cache=False).logits)
        F.cross_entropy(stock_logits[-1].flatten(0, 1), targets[-1].flatten(), reduction="sum").backward()
    logits_BLV = model(tokens_BL, SequenceContext(reset_BL=reset_BL))
    torch.testing.assert_close(logits_BLV, torch.cat(stock_logits, 1), atol=TOLERANCE, rtol=TOLERANCE)
    loss, _ = model(tokens_BL, SequenceContext(reset_BL=reset_BL), torch.cat(targets, 1))
    loss.backward()
    check_gradients(model, stock_model, model_type)
