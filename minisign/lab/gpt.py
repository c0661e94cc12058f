"""A small GPT in one file: embeddings, blocks of attention and MLP, an output matrix.

    ids [B, T] → embedding + position [B, T, D] → blocks → (norm) → head → logits [B, T, V]

Choices that the lessons turn on are options: where the norm stands (``norm="pre"`` as in GPT-2, or
``"post"`` as in the original transformer) and whether the output matrix is the embedding (``tie``).
Linear layers carry no bias; norms do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisign.lab.parallel import mean_over_processes

NORMS = ("pre", "post")
TIES = ("none", "tied", "half_swap")
HEADS = ("plain", "bias", "centered")
INITS = ("gpt2", "xavier")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a :class:`GPT`.

    Args:
        vocab_size: V, tokens.
        context: longest sequence, in tokens.
        layers: number of blocks.
        heads: attention heads; divides ``width``.
        width: D, entries of a hidden state.
        norm: ``"pre"`` (before attention and MLP, and once at the end) or ``"post"`` (after the sum).
        tie: ``"none"``, the output matrix is its own; ``"tied"``, it is the embedding;
            ``"half_swap"``, the same after swapping the halves of the hidden state, so that a token
            does not predict itself at the start (kexue.fm/archives/9698).
        embedding_std: standard deviation of the token embedding at the start.
        head: ``"plain"``, the output layer has no bias, as in GPT-2; ``"bias"``, it has one;
            ``"centered"``, it has one and sees hidden states less their mean over tokens, hence no
            direction that they all share.
        init: of the blocks' matrices. ``"gpt2"``: N(0, 0.02²), and N(0, 0.02² / 2·layers) for those that
            write to the residual stream; small in a narrow model. ``"xavier"``: uniform in ±√(6/(inputs +
            outputs)), each of the three in ``qkv`` by itself, as in the original transformer: outputs are
            about as large as inputs at any width (Glorot and Bengio 2010).
    """

    vocab_size: int
    context: int
    layers: int
    heads: int
    width: int
    norm: str = "pre"
    tie: str = "none"
    embedding_std: float = 0.02
    head: str = "plain"
    init: str = "gpt2"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: choose from {', '.join(NORMS)}")
        if self.tie not in TIES:
            raise ValueError(f"unknown tie {self.tie!r}: choose from {', '.join(TIES)}")
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}: choose from {', '.join(HEADS)}")
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}: choose from {', '.join(INITS)}")
        if not self.embedding_std > 0:
            raise ValueError(f"embedding_std must be positive, got {self.embedding_std}")
        if self.tie == "half_swap" and self.width % 2:
            raise ValueError(f"tie='half_swap' needs an even width, got {self.width}")


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, D / heads]
            for y in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """Two layers, four times as wide in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each with its norm and a residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Center(nn.Module):
    """x minus its mean over the batch's tokens, on all processes; out of training, minus the running mean
    of those means."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        if not self.training:
            return x - self.mean
        mean = mean_over_processes(x.flatten(0, -2))
        self.mean.lerp_(mean.detach(), 0.1)
        return x - mean


class GPT(nn.Module):
    """``model(ids)`` gives the logits of the next token.

    ``model.embedding`` is the token embedding, ``model.head`` the output layer; with tied embeddings
    both have the same weight. Matrices start as N(0, 0.02²), the token embedding as N(0, embedding_std²),
    and those of the blocks as ``init`` says.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.center = Center(config.width) if config.head == "centered" else nn.Identity()
        self.head = nn.Linear(config.width, config.vocab_size, bias=config.head != "plain")
        for name, p in self.named_parameters():
            if name == "head.bias":
                nn.init.zeros_(p)
            if p.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)
            if p.dim() == 2 and config.init == "xavier" and name.startswith("blocks."):
                for part in p.chunk(3) if name.endswith("qkv.weight") else [p]:
                    nn.init.xavier_uniform_(part)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if config.tie != "none":
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] for token ids [B, T], int64.

        Raises:
            ValueError: more tokens than ``context``.
        """
        logits: Tensor = self.head(self.features(ids))
        return logits

    def features(self, ids: Tensor) -> Tensor:
        """What the output layer sees [B, T, D] for token ids [B, T]."""
        length = ids.shape[-1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        x = self.embedding(ids) + self.position(torch.arange(length, device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.center(self.norm(x))
        if self.config.tie == "half_swap":
            x = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
        return x

    @torch.no_grad()
    def sample(self, ids: Tensor, length: int, seed: int = 0) -> Tensor:
        """``ids`` [T] and ``length`` more tokens, each drawn from what the model expects there.

        Of a longer text the last ``context`` tokens count. Leaves torch's global generator alone, and the
        model in the mode it was in.

        Raises:
            ValueError: no token to start from.
        """
        if not len(ids):
            raise ValueError("sampling needs at least one token to start from, got none")
        training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(length):
            logits = self(ids[None, -self.config.context :])[0, -1]
            drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat([ids, drawn.to(ids.device)])
        self.train(training)
        return ids
