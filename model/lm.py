"""The language model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..kernels import linear_cross_entropy
from .block import Block
from .config import ModelConfig
from .init import Normal, generator_for
from .linear import Embedding, Linear
from .norms import RMSNorm
from .rules import NO_DECAY_KINDS, ParameterKind, ParameterRule, ShardRule, collect_rules
from .sequence import SequenceContext

EMBEDDING_STD = 0.02


class HybridLM(nn.Module):
    """Embedding, residual layers by pattern, final norm, output head (absent when tied to the embedding).

    `loss` is a seam: parallelism sets another callable there. With `stage`, a range of layer numbers, only that stretch
    of the model: the embedding belongs to the first, norm and head (a tied one brings the embedding) to the last.

    Built on any device, the meta device included; every parameter holds NaN until `initialize` or a load.

    Raises:
        UserError: listing every problem of the configuration.
        ValueError: when a parameter has no initialisation rule, naming it.
    """

    def __init__(self, config: ModelConfig, stage: range | None = None) -> None:
        super().__init__()
        if problems := config.problems():
            raise UserError("the model cannot be built: " + " | ".join(problems))
        self.config = config
        vocab, width, eps = config.vocab_size, config.d_model, config.norm_eps
        layers = config.layers
        stage = range(len(layers)) if stage is None else stage
        self.is_first, self.is_last = stage.start == 0, stage.stop == len(layers)
        tied_head = self.is_last and config.tie_embeddings
        self.embed = Embedding(vocab, width) if self.is_first or tied_head else None
        # By number in the whole model, so that a stage names its parameters as the whole does.
        self.layers = nn.ModuleDict({str(i): Block(layers[i].build(width, eps, i), width, eps) for i in stage})
        self.norm = RMSNorm(width, eps) if self.is_last else None
        self.lm_head = Linear(width, vocab, bias=False) if self.is_last and not tied_head else None
        vocabulary = ShardRule(0, "vocabulary", vocab)
        self.parameter_rules = {
            "embed.weight": ParameterRule(Normal(EMBEDDING_STD), "embedding", vocabulary),
            "lm_head.weight": ParameterRule(Normal(EMBEDDING_STD), "head", vocabulary),
        }
        self.loss = linear_cross_entropy
        self._rules = collect_rules(self)

    def forward(
        self,
        tokens_BL: Tensor,
        seq: SequenceContext | None = None,
        targets_BL: Tensor | None = None,
        *,
        last_only: bool = False,
        inflow_BLD: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the summed loss.

        Args:
            tokens_BL: int64 token numbers.
            seq: document starts and carried state; None: every row is one document.
            targets_BL: int64 token to predict at each place, -100 for none.
            last_only: logits of the last token of each row only.
            inflow_BLD: what the stage before returned, on stages that are not the first.

        Returns:
            without targets, logits (B, L or 1, V), at least float32; with targets, the cross-entropy in nats summed
            over the targets and their number, both float32 scalars. The logits are then never whole. A stage that is
            not the last returns what goes on to the next instead.
        """
        seq = SequenceContext() if seq is None else seq
        seq.enter(*tokens_BL.shape)
        x_BLD = self._begin(tokens_BL) if inflow_BLD is None else inflow_BLD
        update_BLD: Any = None  # of the last layer, not yet added
        for layer in self.layers.values():
            x_BLD, update_BLD = layer(x_BLD, seq, update_BLD)
        seq.advance(tokens_BL.shape[1], tokens_BL.device, tokens_BL.shape[0])
        if self.norm is None:
            return x_BLD + update_BLD
        if last_only:
            x_BLD, update_BLD = x_BLD[:, -1:], update_BLD[:, -1:]
        x_BLD, _ = self.norm(x_BLD, update_BLD)
        head = self.embed if self.lm_head is None else self.lm_head
        assert head is not None
        if targets_BL is not None:
            return self.loss(x_BLD.flatten(0, 1), head.weight, targets_BL.flatten())
        logits_BLV = F.linear(x_BLD, head.weight)
        return logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))

    def _begin(self, tokens_BL: Tensor) -> Tensor:
        assert self.embed is not None
        x_BLD = self.embed(tokens_BL)
        if self.config.residual_in_fp32:
            x_BLD = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        return x_BLD

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """First values of all parameters: (name, whole float32 CPU tensor), one at a time.

        Each is a function of its name, the seed, its global shape and the number of layers, so every layout begins
        with the same model.
        """
        depth = len(self.config.layers)
        for name, parameter in self.named_parameters():
            yield name, self._rules[name].init.draw(parameter.shape, generator_for(name, seed), depth)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Give all parameters their first values, in one process."""
        parameters = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            parameters[name].copy_(value)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """Kind of every parameter by name: `matrix`, `embedding`, `head`, `conv`, `norm`, `bias` or `ssm`."""
        return {name: rule.kind for name, rule in self._rules.items()}

    def no_decay_names(self) -> set[str]:
        """Parameters without weight decay: norms, biases, A_log, D and dt_bias."""
        return {name for name, kind in self.parameter_kinds().items() if kind in NO_DECAY_KINDS}

    def shard_rules(self) -> dict[str, ShardRule]:
        """How tensor parallelism may cut each parameter, by name."""
        return {name: rule.shard for name, rule in self._rules.items()}
