"""The configuration of a model, and what follows from it by counting."""

from dataclasses import dataclass

from ..errors import UserError
from .layer import LayerConfig
from .pattern import parse_pattern
from .registry import LAYER_KINDS, LayerTables


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LayerTables):
    """A language model: a pattern of residual layers between an embedding and a head.

    Args:
        vocab_size: V, rows of the embedding.
        d_model: D, width of the residual stream.
        pattern: words and counted groups, such as "4*(mamba2 mlp) attention mlp"; the words are the layer kinds,
            whose options are the tables of the same names.
        tie_embeddings: the head uses the embedding's matrix.
        norm_eps: epsilon of all RMS norms.
        residual_in_fp32: keep the residual stream in float32 when the weights are narrower.
    """

    vocab_size: int
    d_model: int
    pattern: str
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, in order. Raises UserError when the pattern cannot be read."""
        return parse_pattern(self.pattern, LAYER_KINDS)

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The options of every layer, in order."""
        return tuple(getattr(self, kind) for kind in self.kinds)

    def problems(self) -> list[str]:
        """Every broken rule as "field=value rule; remedy"; tables that the pattern does not use are not checked."""
        found = [
            f"{name}={value} must be at least 1; use a positive whole number"
            for name, value in {"vocab_size": self.vocab_size, "d_model": self.d_model}.items()
            if value < 1
        ]
        if not 0 < self.norm_eps < 1:
            found.append(f"norm_eps={self.norm_eps} must lie between 0 and 1; use a small number such as 1e-5")
        try:
            kinds = dict.fromkeys(self.kinds)
        except UserError as error:
            return [*found, str(error)]
        if self.d_model >= 1:
            found += [f"{kind}.{line}" for kind in kinds for line in getattr(self, kind).problems(self.d_model)]
        return found

    def num_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        matrices = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        layers = self.layers
        return matrices + sum(layer.num_params(self.d_model) + self.d_model for layer in layers) + self.d_model

    def num_active_params(self) -> int:
        """Number of parameters that one token meets: of experts, those it goes to."""
        unused = [layer.num_params(self.d_model) - layer.num_active_params(self.d_model) for layer in self.layers]
        return self.num_params() - sum(unused)

    def flops_per_token(self, L: int) -> int:
        """Floating-point operations of training, forward and backward, per token of rows of L tokens.

        Two operations per multiply-add, and the backward pass twice the forward. Counted: matrix products of
        all projections and of the output head; in attention, scores and mixing over the keys that a token sees (the
        causal half, or the window); in SSD, the four products of the chunked form at the configured chunk size, the
        causal half within chunks; in the selective scan, update and read-out of every state. Not counted: embedding
        lookup, convolution, norms, activations, recomputation.
        """
        head = 6 * self.vocab_size * self.d_model
        return head + sum(layer.flops_per_token(self.d_model, L) for layer in self.layers)

    def state_bytes(self, L: int, element_bytes: int = 4) -> int:
        """Bytes of one sequence's decoding state after L tokens, in a model of `element_bytes` per element."""
        return sum(layer.state_bytes(self.d_model, L, element_bytes) for layer in self.layers)
