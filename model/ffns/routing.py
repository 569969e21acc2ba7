"""Which experts a token goes to, with what weight, and what keeps their load even.

| published as                  | score    | renormalize | balance          | more                           |
| ----------------------------- | -------- | ----------- | ---------------- | ------------------------------ |
| Switch (arXiv:2101.03961)     | softmax  | no          | loss, top 1      | jitter                         |
| Mixtral, Granite              | softmax  | yes         | loss             | softmax over the chosen alone  |
| Jamba                         | softmax  | no          | loss             |                                |
| DeepSeek-V2                   | softmax  | no          | loss             | groups, scale                  |
| DeepSeek-V3, Nemotron 3 Nano  | sigmoid  | yes         | bias             | groups, scale, shared expert   |
| BlackMamba (arXiv:2402.01771) | sigmoid  | no          | sinkhorn, top 1  |                                |
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..sequence import SequenceContext, TrainingPass
from .jitter import jittered

# Of the numbers that a router tells of a pass, those after the load of each expert.
TOLD = ("entropy", "tokens", "nonfinite")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of a router; `MoEConfig` adds those of the experts.

    Args:
        num_experts: X.
        top_k: experts that a token goes to.
        score: logits to scores, over all experts or each on its own.
        renormalize: weights of a token's experts sum to one; with `softmax` that is a softmax over the chosen alone.
        scale: factor of all weights.
        num_groups, top_groups: a token's experts come from its `top_groups` best of `num_groups` groups of neighbours.
        balance: by a loss, by a bias that moves with the load, by Sinkhorn normalisation in training, or not at all.
        balance_scope: what the load is counted over: each row, or all rows that pass through the model at a time.
        balance_loss: coefficient of the balance loss; of a perfectly even load, the loss is 1.
        bias_rate: step of the balance bias for each update.
        sinkhorn_iterations: how often tokens and experts are normalised.
        z_loss: coefficient of the mean squared log-partition of the logits (ST-MoE, arXiv:2202.08906, equation 5).
        jitter: in training the router sees its input times uniform noise in `1 - jitter` to `1 + jitter`.
        chunk: this many neighbouring tokens of a document share the decision made for the first of them.
    """

    num_experts: int = 8
    top_k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    balance: Literal["loss", "bias", "sinkhorn", "none"] = "loss"
    balance_scope: Literal["row", "batch"] = "row"
    balance_loss: float = 0.01
    bias_rate: float = 0.001
    sinkhorn_iterations: int = 8
    z_loss: float = 0.0
    jitter: float = 0.0
    chunk: int = 1


class Routing(NamedTuple):
    """A decision for each token: its experts, best first, and the weights of their outputs (at least float32)."""

    experts_Tk: Tensor
    weights_Tk: Tensor


@dataclass(frozen=True)
class Tokens:
    """Those of a training pass's tokens that a router is given.

    Args:
        row_T: the row of each.
        number_T: its number in the run.
        counts_T: whether it counts, as 0.0 or 1.0.
        rows: of the pass.
    """

    row_T: Tensor
    number_T: Tensor
    counts_T: Tensor
    rows: int


def whole(sums: Tensor) -> Tensor:
    """The seam `total` for tokens that are all here."""
    return sums


def all_tokens(count: int) -> slice:
    """The seam `own` for tokens that are all here."""
    return slice(0, count)


def of_chunk(logits_TX: Tensor, chunk: int, seq: SequenceContext, layer: int) -> Tensor:
    """The seam `of_chunk`: of each token's chunk of its document, the logits of the first token."""
    (rows, length), reach = seq.shape, chunk - 1
    logits_BLX = logits_TX.view(rows, length, -1)
    past = None if seq.states is None else seq.states.get(layer, "router")
    if past is None:
        past = logits_BLX.new_zeros(rows, reach, logits_BLX.shape[2])
    joined = torch.cat([past, logits_BLX], 1)
    if seq.states is not None:
        seq.states.put(layer, router=joined[:, length:])
    return first_of_chunk(joined, seq.position_BL(length, joined.device), chunk).flatten(0, 1)


def first_of_chunk(joined: Tensor, position_BL: Tensor, chunk: int) -> Tensor:
    """For tokens at these places of their documents: of `chunk - 1` more tokens and them, the first of each's chunk."""
    (rows, _, X), length = joined.shape, position_BL.shape[1]
    first_BL = torch.arange(length, device=joined.device) + chunk - 1 - position_BL % chunk
    return joined.gather(1, first_BL.expand(rows, length)[..., None].expand(-1, -1, X))


class Router(nn.Module):
    """A linear map to logits of experts, in float32, and the choice made by them.

    `total`, `own` and `of_chunk` are seams: with what parallelism sets there, sums are over all tokens that a balance
    is judged by, and tokens may be a share of the pass's.

    `balance_bias` (auxiliary-loss-free balancing, Wang et al. 2024, arXiv:2408.15664) is added to scores where experts
    are chosen, and nowhere else; it has no gradient, and `move_bias` moves it once an update.
    """

    keep_fp32 = True

    def __init__(self, config: RouterConfig, d_model: int, layer_index: int) -> None:
        super().__init__()
        self.config, self.layer_index = config, layer_index
        self.weight = nn.Parameter(torch.full((config.num_experts, d_model), float("nan")))
        self.balance_bias: nn.Parameter | None = None
        if config.balance == "bias":
            self.balance_bias = nn.Parameter(torch.full((config.num_experts,), float("nan")), requires_grad=False)
        self.total = whole
        self.own = all_tokens
        self.of_chunk = of_chunk

    def forward(self, x_TD: Tensor, seq: SequenceContext) -> Routing:
        """Route tokens; in a training pass, add the balance loss and z-loss to the gradient and tell of the load."""
        config, training = self.config, seq.training
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(dtype)
        tokens = None if training is None else self._tokens(training, seq, dtype)
        if tokens is not None and config.jitter:
            x_TD = jittered(x_TD, config.jitter, tokens.number_T, self.layer_index)
        logits_TX = F.linear(x_TD, self.weight.to(dtype))
        if config.chunk > 1:
            logits_TX = self.of_chunk(logits_TX, config.chunk, seq, self.layer_index)
        scores_TX = logits_TX.softmax(-1) if config.score == "softmax" else logits_TX.sigmoid()
        experts_Tk = choose(self._preference(logits_TX, scores_TX, tokens), config)
        weights_Tk = scores_TX.gather(1, experts_Tk)
        if config.renormalize:
            weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + (1e-20 if config.score == "sigmoid" else 0))
        weights_Tk = weights_Tk * config.scale
        if training is not None and tokens is not None:
            weights_Tk = self._judge(logits_TX, scores_TX, experts_Tk, weights_Tk, tokens, training)
        return Routing(experts_Tk, weights_Tk)

    def _tokens(self, training: TrainingPass, seq: SequenceContext, dtype: torch.dtype) -> Tokens:
        rows, length = seq.shape

        def make() -> Tokens:
            own = self.own(rows * length)
            number_T = training.number_BL.flatten()[own]
            row_T = torch.arange(rows, device=number_T.device).repeat_interleave(length)[own]
            return Tokens(row_T, number_T, (number_T >= 0).to(dtype), rows)

        return seq.shared(("routed tokens", dtype), make)

    def _preference(self, logits_TX: Tensor, scores_TX: Tensor, tokens: Tokens | None) -> Tensor:
        """What the best experts have most of."""
        if self.config.balance == "sinkhorn" and tokens is not None:
            return self._sinkhorn(logits_TX.detach(), tokens)
        preference_TX = scores_TX.detach()
        return preference_TX if self.balance_bias is None else preference_TX + self.balance_bias.to(scores_TX.dtype)

    def _sinkhorn(self, logits_TX: Tensor, tokens: Tokens) -> Tensor:
        """Logits moved for each expert until all have about as many tokens (Clark et al. 2022, arXiv:2202.01169).

        Alternating normalisation of tokens and experts, a fixed number of times. As published, what a token prefers
        depends on all tokens of the balance's scope, later ones too; evaluation takes the scores alone.
        """
        experts = logits_TX.shape[1]
        moved_TX = logits_TX
        for _ in range(self.config.sinkhorn_iterations):
            share_TX = moved_TX.softmax(-1) * tokens.counts_T[:, None]
            load = self._by_scope(share_TX, tokens)
            even = load.sum(-1, keepdim=True) / experts
            moved_TX = moved_TX + (even.clamp(min=1e-30) / load.clamp(min=1e-30)).log()[self._place(tokens)]
        return moved_TX

    def _by_scope(self, values_TX: Tensor, tokens: Tokens) -> Tensor:
        """Sums over the tokens of each row, or of the whole batch, on all ranks: `(rows or 1, X)`."""
        if self.config.balance_scope == "batch":
            return self.total(values_TX.sum(0, keepdim=True))
        of_row_BT = torch.arange(tokens.rows, device=values_TX.device)[:, None] == tokens.row_T
        return self.total(of_row_BT.to(values_TX.dtype) @ values_TX)

    def _place(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.row_T) if self.config.balance_scope == "batch" else tokens.row_T

    def _judge(
        self,
        logits_TX: Tensor,
        scores_TX: Tensor,
        experts_Tk: Tensor,
        weights_Tk: Tensor,
        tokens: Tokens,
        training: TrainingPass,
    ) -> Tensor:
        """The weights, through which what is added to the loss gets its gradient.

        Everything is added per token, as the cross-entropy is, so that its share of the loss does not depend on how
        rows are dealt. Of one token the balance loss is `X sum_x load_x p_x`, with the load as a share of all choices
        in the scope: its mean over a row or batch is that of Switch (equation 4), 1 where the load is even.
        """
        config, experts = self.config, scores_TX.shape[1]
        chosen_TX = torch.zeros_like(scores_TX).scatter(1, experts_Tk, 1.0) * tokens.counts_T[:, None]
        share_TX = scores_TX if config.score == "softmax" else scores_TX / scores_TX.sum(-1, keepdim=True)
        counted_T = tokens.counts_T
        added = scores_TX.new_zeros(())
        if config.balance == "loss" and config.balance_loss:
            load = self._by_scope(chosen_TX, tokens)
            load = experts * load / load.sum(-1, keepdim=True).clamp(min=1)
            added = added + config.balance_loss * ((share_TX * load[self._place(tokens)]).sum(-1) @ counted_T)
        if config.z_loss:
            added = added + config.z_loss * (logits_TX.logsumexp(-1).square() @ counted_T)
        with torch.no_grad():
            entropy = torch.special.entr(share_TX).sum(-1) @ counted_T
            broken = (~logits_TX.isfinite().all(-1)).to(counted_T.dtype) @ counted_T
            rest = torch.stack([entropy, counted_T.sum(), broken])
            training.told[self.layer_index] = torch.cat([chosen_TX.sum(0), rest]).double()
        return _Added.apply(weights_Tk, added, training.loss_scale) if added.requires_grad else weights_Tk


def choose(preference_TX: Tensor, config: RouterConfig) -> Tensor:
    """The `top_k` experts of each token, those of its `top_groups` best groups only where there are groups.

    A group is as good as its two best experts together (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), with softmax
    scores as its best (DeepSeek-V2, arXiv:2405.04434, section 2.1.3).
    """
    if config.num_groups > 1:
        by_group = preference_TX.unflatten(1, (config.num_groups, -1))
        best = min(2 if config.score == "sigmoid" else 1, by_group.shape[2])
        group_scores = by_group.topk(best, dim=-1).values.sum(-1)
        groups = group_scores.topk(config.top_groups, dim=-1).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, groups, True)
        preference_TX = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
    return preference_TX.topk(config.top_k, dim=-1).indices


class _Added(torch.autograd.Function):
    """`x`, and a term of the loss whose gradient is the scale: no layer after this one has to hand it on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, scale: Tensor) -> Tensor:
        """`x` itself."""
        ctx.dtype = added.dtype
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        """The scale for the term, whatever `dx` is."""
        (scale,) = ctx.saved_tensors
        return dx, scale.to(ctx.dtype), None


@torch.no_grad()
def move_bias(bias_X: Tensor, load_X: Tensor, rate: float, skip: Tensor) -> Tensor:
    """The balance bias after an update: up by `rate` for experts below the mean load, down for those above.

    Algorithm 1 of arXiv:2408.15664. Where `skip` is 1, as it was.
    """
    step_X = (load_X.mean() - load_X).sign().to(bias_X.dtype) * rate
    return torch.where(skip > 0, bias_X, bias_X + step_X)
