"""A byte-level LLaMA whose training step is bound by the GPU, not by Python.

Parameters are float32, everything in between is bfloat16 on a GPU (what autocast does to products,
and the residual stream too), losses and norms are computed in float32. A block and the head with
its loss are pure functions of tensors, each compiled once: all blocks and all runs of one size share
the two programs, so that a new model costs no compilation. The weights of q, k, v and of gate, up
are put together for one product each; they stay separate parameters for the optimizer.
Where compiling fails, the same functions run as they are, and the result says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # hidden, ffn, layers, heads
    "tiny": (64, 160, 2, 2), "10M": (512, 1024, 4, 8), "25M": (512, 1376, 8, 8), "60M": (768, 2048, 9, 12),
}  # fmt: skip
EPS = 1e-6


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to [batch, heads, tokens, width]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)


def attend(x: Tensor, weights: tuple[Tensor, ...], rotary: tuple[Tensor, Tensor]) -> Tensor:
    """[batch, tokens, hidden] to the attention's contribution to it."""
    norm, q, k, v, o = weights
    batch, tokens, hidden = x.shape
    cos, sin = rotary
    y = F.rms_norm(x, (hidden,), norm.to(x.dtype), EPS)
    together = F.linear(y, torch.cat([q, k, v]).to(x.dtype))
    width = 2 * cos.shape[1]
    queries, keys, values = (
        part.view(batch, tokens, hidden // width, width).transpose(1, 2)
        for part in together.chunk(3, dim=-1)
    )
    attended = F.scaled_dot_product_attention(
        rotate(queries, cos, sin), rotate(keys, cos, sin), values, is_causal=True
    )
    return F.linear(attended.transpose(1, 2).reshape(batch, tokens, hidden), o.to(x.dtype))


def feed(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU's contribution."""
    y = F.rms_norm(x, (x.shape[-1],), norm.to(x.dtype), EPS)
    gated, raised = F.linear(y, torch.cat([gate, up]).to(x.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gated) * raised, down.to(x.dtype))


def block(
    x: Tensor,
    attention: tuple[Tensor, ...],
    mlp: tuple[Tensor, Tensor, Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """One LLaMA block: RMSNorm, rotary attention, RMSNorm, SwiGLU."""
    x = x + attend(x, attention, rotary)
    return x + feed(x, *mlp)


def head_loss(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of the next byte."""
    y = F.rms_norm(x, (x.shape[-1],), norm.to(x.dtype), EPS)
    logits = F.linear(y, head.to(x.dtype)).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Programs:
    """The block and the loss, compiled if that works here."""

    def __init__(self, *, compiled: bool) -> None:
        self.block: Callable[..., Tensor] = block
        self.head_loss: Callable[..., Tensor] = head_loss
        self.note = "not compiled: not asked for"
        if compiled:
            self.block = torch.compile(block, dynamic=False)
            self.head_loss = torch.compile(head_loss, dynamic=False)
            self.note = "compiled by torch.compile, block by block"

    def give_up(self, error: BaseException) -> None:
        """Go on without compiling, and say why."""
        self.block, self.head_loss = block, head_loss
        self.note = f"not compiled: {type(error).__name__}: {error}"[:400]


class Layer(nn.Module):
    """The parameters of one block."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def tensors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return what `block` takes: attention's and the MLP's weights."""
        attention = (
            self.norm1.weight, self.q.weight, self.k.weight, self.v.weight, self.o.weight,
        )  # fmt: skip
        return attention, (self.norm2.weight, self.gate.weight, self.up.weight, self.down.weight)


class Llama(nn.Module):
    """A byte-level LLaMA with an untied head; `forward` returns the mean loss of the next byte."""

    def __init__(self, size: str, tokens: int, programs: Programs, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, ffn, layers, heads = SIZES[size]
        self.programs, self.dtype = programs, dtype
        self.embed = nn.Embedding(256, hidden)
        self.layers = nn.ModuleList([Layer(hidden, ffn) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, 256, bias=False)
        frequency = 10000.0 ** -(torch.arange(0, hidden // heads, 2) / (hidden // heads))
        angle = torch.arange(tokens).unsqueeze(1) * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """[batch, tokens + 1] bytes as int64 to a scalar."""
        x: Any = self.embed(text[:, :-1]).to(self.dtype)
        rotary = (self.cos, self.sin)
        for layer in self.layers:
            x = self.programs.block(x, *layer.tensors(), rotary)
        return self.programs.head_loss(x, self.norm.weight, self.head.weight, text[:, 1:])
