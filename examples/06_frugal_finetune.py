"""Fine-tune a small byte-level Llama with AdamW and with FRUGAL: the same loss, less state.

The model first learns English-like text (docstrings of Python's standard library), then is fine-tuned
on its code. Both optimizers get the same batches. On two CPU cores this takes about 20 seconds.
"""

from __future__ import annotations

import ast
import copy
import sysconfig
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memopt.optim import Frugal, frugal_groups

LENGTH, BATCH = 96, 8
RATE = 2e-3  # AdamW's best of 3e-4, 1e-3, 2e-3 and 3e-3 here; FRUGAL's best is 3e-3


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (docstrings, code) of the standard library as bytes."""
    prose, code = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        source = path.read_text(encoding="utf-8", errors="ignore")
        code.append(source)
        nodes = [
            n
            for n in ast.walk(ast.parse(source))
            if isinstance(n, (ast.FunctionDef, ast.Module, ast.ClassDef))
        ]
        prose += [ast.get_docstring(node) or "" for node in nodes]
    return as_bytes("\n".join(prose)), as_bytes("\n".join(code))


def as_bytes(text: str) -> torch.Tensor:
    """Return a text's bytes as int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batch(text: torch.Tensor, seed: int) -> torch.Tensor:
    """Return [BATCH, LENGTH] from random places, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator).tolist()
    return torch.stack([text[start : start + LENGTH] for start in starts])


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    text: torch.Tensor,
    steps: int,
    seed: int,
) -> None:
    """Train with a linear decay of the learning rate."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        tokens = batch(text, seed + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: torch.Tensor) -> float:
    """Return the loss over batches that training never draws."""
    losses = []
    for seed in range(30):
        tokens = batch(text, 10**6 + seed)
        losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    return sum(losses) / len(losses)


def small_llama() -> torch.nn.Module:
    """Return a Llama of half a million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
                    num_attention_heads=4, max_position_embeddings=LENGTH)
    )  # fmt: skip


def main(
    pretrain_steps: int = 80, finetune_steps: int = 80, base: torch.nn.Module | None = None
) -> dict[str, tuple[float, int]]:
    """Pre-train once, fine-tune twice; return {optimizer: (loss, state bytes)}."""
    prose, code = texts()
    base = small_llama() if base is None else base
    train(base, torch.optim.AdamW(base.parameters(), lr=3e-3), prose, pretrain_steps, seed=1)
    before = evaluate(base, code)
    results = {"before fine-tuning": (before, 0)}
    for name in ("AdamW", "FRUGAL"):
        model = copy.deepcopy(base)
        if name == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                model.parameters(), lr=RATE, weight_decay=0.0
            )
        else:
            groups = frugal_groups(model, density=0.25, update_gap=50)
            print(groups)
            optimizer = Frugal(groups, lr=RATE)
        begin = time.perf_counter()
        train(model, optimizer, code, finetune_steps, seed=10**5)
        seconds = time.perf_counter() - begin
        state = sum(
            v.numel() * v.element_size()
            for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)
        )  # fmt: skip
        results[name] = evaluate(model, code), state
        print(
            f"memopt: {name}: loss {before:.4f} -> {results[name][0]:.4f}, state {state:,} bytes, {seconds:.1f} s"
        )
    return results


if __name__ == "__main__":
    main()
