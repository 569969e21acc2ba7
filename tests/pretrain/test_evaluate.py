"""Held-out evaluation: the whole document is the context, and neither windows nor ranks change the figure."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from headrace.data import TokenDataset
from headrace.model.lm import HybridLM
from headrace.model.sequence import LayerStates, SequenceContext
from headrace.pretrain.config import Config, EvalConfig
from headrace.pretrain.evaluate import Evaluation, WholeModel, choose_documents, evaluate, num_windows, share_documents
from tiny import tiny_config


def build(config: Config) -> HybridLM:
    model = HybridLM(config.model).double()
    model.initialize(1)
    return model


def run(config: Config, how: EvalConfig) -> Evaluation:
    scorer = WholeModel(build(config), torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    return evaluate(scorer, TokenDataset(config.data.folder, "heldout"), how)


def whole_documents(model: HybridLM, dataset: TokenDataset) -> float:
    """Bits per byte with each document in one forward pass."""
    nats = 0.0
    for index in range(dataset.num_documents):
        tokens = torch.from_numpy(dataset.document(index).astype("int64"))[None]
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        nats += float(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum"))
    return nats / math.log(2) / dataset.text_bytes


@pytest.mark.parametrize(("ranks", "window"), [(1, 10_000), (1, 7), (2, 16), (4, 33)])
def test_neither_windows_nor_ranks_matter(gloo: Callable, tmp_path: Path, data: Path, ranks: int, window: int) -> None:
    dataset = TokenDataset(data, "heldout")
    expected = whole_documents(build(tiny_config(tmp_path, data)), dataset)
    for found in gloo(ranks, run, tiny_config(tmp_path, data), EvalConfig(window=window)):
        assert found.bits_per_byte == pytest.approx(expected, rel=1e-6)
        assert found.documents == dataset.num_documents
        assert found.tokens == dataset.num_tokens - dataset.num_documents
        assert found.text_bytes == dataset.text_bytes
        assert found.loss * found.tokens / math.log(2) == pytest.approx(found.bits_per_byte * found.text_bytes)


def test_fewer_documents_than_ranks(gloo: Callable, tmp_path: Path, data: Path) -> None:
    config, how = tiny_config(tmp_path, data), EvalConfig(window=16, max_tokens=1)
    (expected,) = gloo(1, run, config, how)
    assert expected.documents == 1
    assert all(f.loss == pytest.approx(expected.loss) for f in gloo(4, run, config, how))


def test_max_keys_limits_attention_and_nothing_else(gloo: Callable, tmp_path: Path, data: Path) -> None:
    limited, full = EvalConfig(window=8, max_keys=4), EvalConfig(window=8)
    (a,), (b,) = (gloo(1, run, tiny_config(tmp_path, data), how) for how in (limited, full))
    assert a.loss != b.loss
    recurrent = tiny_config(tmp_path, data, "model.pattern=mamba2 mlp")
    (a,), (b,) = (gloo(1, run, recurrent, how) for how in (limited, full))
    assert a.loss == b.loss


def test_keep_last_keys(tmp_path: Path, data: Path) -> None:
    states = LayerStates()
    model = build(tiny_config(tmp_path, data))
    with torch.no_grad():
        model(torch.arange(12)[None], SequenceContext(states=states))
    before = {name: tensor.clone() for name, tensor in states.layers[2].items()}
    recurrent = {name: tensor.clone() for name, tensor in states.layers[0].items()}
    states.keep_last_keys(5)
    assert {n: t.shape[2] for n, t in states.layers[2].items()} == {"keys": 5, "values": 5}
    assert all(torch.equal(t, before[n][:, :, -5:]) for n, t in states.layers[2].items())
    assert all(torch.equal(t, recurrent[n]) for n, t in states.layers[0].items())


def test_documents_are_chosen_whole_and_always_the_same(data: Path) -> None:
    dataset = TokenDataset(data, "heldout")
    assert sorted(choose_documents(dataset, 0)) == list(range(dataset.num_documents))
    some = choose_documents(dataset, dataset.num_tokens // 2)
    assert some == choose_documents(dataset, dataset.num_tokens // 2)
    lengths = [dataset.document_length(i) for i in some]
    assert sum(lengths) >= dataset.num_tokens // 2 > sum(lengths[:-1])


def test_shares_cover_everything_once_and_are_even() -> None:
    lengths = [100, 3, 50, 50, 2, 7, 90]
    shares = share_documents(lengths, 3, window=10)
    assert sorted(p for share in shares for p in share) == list(range(len(lengths)))
    loads = [sum(num_windows(lengths[p], 10) for p in share) for share in shares]
    assert max(loads) - min(loads) <= 1
    assert [num_windows(n, 10) for n in (2, 11, 12, 21)] == [1, 1, 2, 2]
