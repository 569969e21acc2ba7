"""Held-out bits per byte, over whole documents, each with all the context it has."""

import math
import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..data import TokenDataset
from ..model.lm import HybridLM
from ..model.sequence import LayerStates, SequenceContext
from ..parallel.comm import sum_over_ranks
from .config import EvalConfig


@dataclass(frozen=True)
class Evaluation:
    """What a model knows of held-out text.

    Attributes:
        documents, tokens, text_bytes: what was read; tokens are those predicted, the end of each document included.
        loss: mean cross-entropy in nats per token.
        bits_per_byte: all the nats over the bytes of the text, in bits.
    """

    documents: int
    tokens: int
    text_bytes: int
    loss: float
    bits_per_byte: float


def choose_documents(dataset: TokenDataset, max_tokens: int) -> list[int]:
    """Documents that hold `max_tokens` together (0: all), drawn the same way each time, at least one."""
    chosen, total = [], 0
    for index in random.Random(0).sample(range(dataset.num_documents), dataset.num_documents):
        chosen.append(index)
        total += dataset.document_length(index)
        if max_tokens and total >= max_tokens:
            break
    return chosen


def share_documents(lengths: list[int], ranks: int, window: int) -> list[list[int]]:
    """Positions in `lengths` for each rank, the longest first to the rank with the fewest windows so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = load.index(min(load))
        shares[rank].append(position)
        load[rank] += num_windows(lengths[position], window)
    return shares


def num_windows(length: int, window: int) -> int:
    """Forward passes for a document of `length` tokens, of which all but the first are predicted."""
    return -(-(length - 1) // window)


class Scorer(Protocol):
    """A model, however it is spread, that scores windows of documents."""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        ...

    @property
    def rank(self) -> int:
        """Which share of the documents this process reads."""
        ...

    @property
    def ranks(self) -> int:
        """How many shares there are."""
        ...

    @property
    def copies(self) -> int:
        """Processes that read each share together, all with the same result."""
        ...

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""

    def new_states(self) -> list[LayerStates]:
        """States before a document."""
        ...

    def score(self, tokens_BL: Tensor, targets_BL: Tensor, states: list[LayerStates]) -> tuple[Tensor, Tensor]:
        """Summed loss of a window and its number of targets; `states` go on to the next window."""
        ...


@dataclass
class WholeModel:
    """A model that every process holds whole; a `Scorer`."""

    model: HybridLM
    device: torch.device
    rank: int
    ranks: int
    copies: int = 1

    def train(self, mode: bool) -> None:
        """See `Scorer.train`."""
        self.model.train(mode)

    def new_states(self) -> list[LayerStates]:
        """See `Scorer.new_states`."""
        return [LayerStates()]

    def score(self, tokens_BL: Tensor, targets_BL: Tensor, states: list[LayerStates]) -> tuple[Tensor, Tensor]:
        """See `Scorer.score`."""
        loss_sum, targets = self.model(tokens_BL, SequenceContext(states=states[0]), targets_BL)
        return loss_sum, targets


@torch.no_grad()
def evaluate(scorer: Scorer, dataset: TokenDataset, config: EvalConfig) -> Evaluation:
    """Score held-out documents, shared out over the ranks. Collective.

    A document runs through the model in windows, the layers' states carried from one to the next. Every rank takes
    the same number of forward passes, because the passes of a sharded model gather parameters together.
    """
    documents = choose_documents(dataset, config.max_tokens)
    lengths = [dataset.document_length(index) for index in documents]
    shares = share_documents(lengths, scorer.ranks, config.window)
    passes = [sum(num_windows(lengths[p], config.window) for p in share) for share in shares]
    scorer.train(False)
    totals = torch.zeros(2, dtype=torch.float64)
    for position in shares[scorer.rank]:
        totals += _score(scorer, torch.from_numpy(dataset.document(documents[position]).astype("int64")), config)
    idle = torch.zeros(1, 1, dtype=torch.int64, device=scorer.device)
    for _ in range(max(passes) - passes[scorer.rank]):
        scorer.score(idle, idle, scorer.new_states())
    scorer.train(True)
    nats, tokens = (sum_over_ranks(totals) / scorer.copies).tolist()
    text_bytes = sum(dataset.document_bytes(index) for index in documents)
    return Evaluation(
        documents=len(documents),
        tokens=int(tokens),
        text_bytes=text_bytes,
        loss=nats / tokens,
        bits_per_byte=nats / math.log(2) / text_bytes,
    )


def _score(scorer: Scorer, document: Tensor, config: EvalConfig) -> Tensor:
    """Nats and tokens of one document, as a float64 pair on the CPU."""
    states = scorer.new_states()
    document = document.to(scorer.device)[None]
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, document.shape[1] - 1, config.window):
        stop = min(start + config.window, document.shape[1] - 1)
        nats, tokens = scorer.score(document[:, start:stop], document[:, start + 1 : stop + 1], states)
        if config.max_keys:
            for state in states:
                state.keep_last_keys(config.max_keys)
        total += torch.tensor([float(nats), float(tokens)], dtype=torch.float64)
    return total
