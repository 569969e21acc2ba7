"""Lets a model write: a prompt in one pass, then one token at a time from the carried state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Tokenizer
from ..errors import UserError
from ..model.lm import HybridLM
from ..model.sequence import LayerStates, SequenceContext
from .saved_run import load_run

__all__ = ["GenerateConfig", "choose_token", "generate_text", "generate_tokens", "load_run"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: tokens written at most; the end of the document ends the text earlier.
        temperature: logits are divided by this; 0 always takes the most probable token.
        top_k: only the k most probable tokens can be drawn; 0 leaves all.
        top_p: only the most probable tokens that hold this probability together; 1 leaves all.
        seed: of the draw; the same seed, prompt and model give the same text.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature={self.temperature} must be 0 (most probable token) or a positive number")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k} must be 0 (all tokens) or positive")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} must be between 0 and 2^63-1")
        return found


def generate_text(model: HybridLM, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> Iterator[str]:
    """Pieces of the text that follows `prompt`, each as soon as its characters are whole.

    The prompt starts a document (BOS); the text ends with EOS or after `max_new_tokens`.

    Raises:
        UserError: a setting out of range, or a tokenizer with more pieces than the model knows.
    """
    if problems := config.problems():
        raise UserError("; ".join(problems))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model knows {model.config.vocab_size}; "
            "use the tokenizer this model was trained with"
        )
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = generate_tokens(model, prompt_ids, config, eos_id=tokenizer.eos_id, num_ids=tokenizer.vocab_size)
    return _decode_stream(tokenizer, tokens)


@torch.inference_mode()
def generate_tokens(
    model: HybridLM, prompt: list[int], config: GenerateConfig, *, eos_id: int, num_ids: int | None = None
) -> Iterator[int]:
    """Token ids that follow the ids in `prompt`, without EOS.

    Only ids below `num_ids` are drawn: a vocabulary may be padded with rows that stand for no piece. The prompt goes
    through the model once; each further token costs one step of constant size (attention layers excepted, whose keys
    and values grow).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    states = LayerStates()
    tokens_BL = torch.tensor([prompt], device=device)
    for _ in range(config.max_new_tokens):
        logits_BLV = model(tokens_BL, SequenceContext(states=states), last_only=True)
        token = choose_token(logits_BLV[0, -1, :num_ids].float().cpu(), config, generator)
        if token == eos_id:
            return
        yield token
        tokens_BL = torch.tensor([[token]], device=device)


def choose_token(logits_V: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """One token id drawn from float32 logits on the CPU: temperature, then top-k, then top-p."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    # From the largest down: dividing by a tiny temperature then gives zeros, not infinities less infinities.
    sorted_V, order_V = ((logits_V - logits_V.max()) / config.temperature).sort(descending=True, stable=True)
    if config.top_k:
        sorted_V = sorted_V[: config.top_k]
    p_V = sorted_V.double().softmax(0)
    if config.top_p < 1:
        # A token stays while the ones before it hold less than top_p; the first always stays.
        p_V = p_V * (p_V.cumsum(0) - p_V < config.top_p)
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])


def _decode_stream(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of a stream of ids. Bytes that are no whole character yet wait for those that follow."""
    # The last piece given out stays in front: some tokenizers treat the first piece of a text differently.
    given: list[int] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = _new_text(tokenizer, given, waiting)
        if text.endswith("\ufffd"):
            continue
        yield text
        given, waiting = waiting, []
    if waiting:
        yield _new_text(tokenizer, given, waiting)


def _new_text(tokenizer: Tokenizer, given: list[int], waiting: list[int]) -> str:
    return tokenizer.decode(given + waiting)[len(tokenizer.decode(given)) :]
