"""Quality of FRUGAL and its rivals: byte-level LLaMAs trained on text that is on the machine.

    python benchmarks/bench_frugal_quality.py --out quality.json --limit-s 540      # again to continue
    python benchmarks/bench_frugal_quality.py --out quality.json --plot quality.png # no training

Every method sees the same batches. First each method's learning rate is chosen from its grid on a
tenth of the data (one seed), then every seed is trained in full at that rate: linear warm-up over
5 %, cosine to a tenth; float32 weights, bfloat16 autocast, no weight decay, no clipping (the
paper's recipe). Finished runs are in the result file and are skipped when it is called again; a
run is not started if the time that is left is less than the last one of its length took.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memopt.optim import Frugal, frugal_groups
from memopt.optim.presets import badam, galore, scale

SUFFIXES = {
    ".py",
    ".pyi",
    ".md",
    ".rst",
    ".txt",
    ".html",
    ".h",
    ".c",
    ".cpp",
    ".hpp",
    ".cuh",
    ".js",
    ".css",
    ".json",
}
SIZES = {  # hidden, ffn, layers, heads
    "tiny": (64, 160, 2, 2), "10M": (384, 1024, 6, 6), "25M": (512, 1376, 8, 8), "60M": (768, 2048, 9, 12),
}  # fmt: skip


# ----------------------------------------------------------------------------------------- text
def text_files() -> Iterator[Path]:
    """Yield text files of this machine: Python's library and packages, system docs and headers."""
    paths = sysconfig.get_paths()
    roots = dict.fromkeys([paths["stdlib"], paths["purelib"], "/usr/lib/python3", "/usr/share", "/usr/include",
                           "/usr/local/lib", "/usr/local/cuda/include"])  # fmt: skip
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink():
                yield path


def corpus(num_bytes: int) -> tuple[Tensor, Tensor, str]:
    """Return (train, validation, digest): files once each by content, every 50th for validation."""
    train, valid, seen, total = [], [], set(), 0
    for path in text_files():
        try:
            data = path.read_bytes()
        except OSError:
            continue
        key = hashlib.blake2b(data, digest_size=12).digest()
        if len(data) < 512 or len(data) > 2_000_000 or key in seen or b"\0" in data:
            continue
        seen.add(key)
        if int.from_bytes(key[:4], "little") % 50 == 0:
            valid.append(data)
        else:
            train.append(data)
            total += len(data)
        if total >= num_bytes:
            break
    order = sorted(range(len(train)), key=lambda i: hashlib.blake2b(train[i][:4096]).digest())
    joined = b"".join(train[i] for i in order)
    digest = hashlib.blake2b(joined, digest_size=8).hexdigest()
    return as_tensor(joined), as_tensor(b"".join(valid)[:4_000_000]), digest


def as_tensor(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------- model
class Block(nn.Module):
    """A LLaMA block: RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, tokens, hidden] to the same."""
        batch, tokens, hidden = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(
            rotate(q, rotary), rotate(k, rotary), v, is_causal=True
        )
        x = x + self.o(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary[0].to(x.dtype), rotary[1].to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Llama(nn.Module):
    """A byte-level LLaMA with an untied head."""

    def __init__(self, hidden: int, ffn: int, layers: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, hidden)
        self.layers = nn.ModuleList([Block(hidden, ffn, heads) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, 256, bias=False)
        frequency = 10000.0 ** -(torch.arange(0, hidden // heads, 2) / (hidden // heads))
        angle = torch.arange(tokens).unsqueeze(1) * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting every next byte."""
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, (self.cos, self.sin))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().view(-1, 256), tokens[:, 1:].reshape(-1))


# ----------------------------------------------------------------------------------------- methods
@dataclass(frozen=True, kw_only=True)
class Method:
    """An optimizer of (model, lr), with the learning rates to choose from."""

    make: Callable[[Llama, float], torch.optim.Optimizer]
    grid: tuple[float, ...]


def methods(gap: int) -> dict[str, Method]:
    """Return what is compared; all split methods share roles (`frugal_groups`) and gap."""

    def split(density: float, **more: Any) -> Callable[[Llama, float], torch.optim.Optimizer]:
        return lambda m, lr: Frugal(frugal_groups(m, density), lr=lr, update_gap=gap, **more)

    def adamw(m: Llama, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0, foreach=True)

    def galore_like(m: Llama, lr: float) -> torch.optim.Optimizer:
        return galore(frugal_groups(m, 0.25), lr=lr, update_gap=gap)

    def badam_like(m: Llama, lr: float) -> torch.optim.Optimizer:
        return badam(frugal_groups(m), lr=lr, num_blocks=4, switch_every=gap)

    return {
        "AdamW": Method(make=adamw, grid=(1e-3, 3e-3, 9e-3)),
        "FRUGAL 0.25": Method(make=split(0.25), grid=(3e-4, 1e-3, 3e-3)),
        "FRUGAL 0": Method(make=split(0.0), grid=(3e-4, 1e-3, 3e-3)),
        "GaLore 0.25": Method(make=galore_like, grid=(3e-3, 1e-2, 3e-2)),
        "BAdam-like": Method(make=badam_like, grid=(1e-3, 3e-3, 9e-3)),
        "SCALE": Method(make=lambda m, lr: scale(m, lr=lr, adam_lr=2e-3), grid=(1e-2, 3e-2, 1e-1)),
    }


# ----------------------------------------------------------------------------------------- training
@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    size: str
    method: str
    lr: float
    seed: int
    num_bytes: int

    @property
    def key(self) -> str:
        """Its name in the result file."""
        return f"{self.size}|{self.method}|{self.lr:g}|{self.seed}|{self.num_bytes}"


class Trainer:
    """Data and settings of all runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        train, valid, self.digest = corpus(options.bytes)
        self.train, self.valid = train.to(self.device), valid.to(self.device)
        self.tokens, self.batch, self.gap = options.tokens, options.batch, options.gap
        self.methods = methods(options.gap)

    def draw(self, data: Tensor, generator: torch.Generator) -> Tensor:
        """Return [batch, tokens + 1] from random places."""
        starts = torch.randint(len(data) - self.tokens - 1, (self.batch, 1), generator=generator)
        where = starts.to(self.device) + torch.arange(self.tokens + 1, device=self.device)
        return data[where].long()

    def loss(self, model: Llama, tokens: Tensor) -> Tensor:
        """Forward under bfloat16 autocast on a GPU."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            found: Tensor = model(tokens)
        return found

    @torch.no_grad()
    def validate(self, model: Llama, batches: int = 16) -> float:
        """Return the loss on fixed places of the validation text."""
        generator = torch.Generator().manual_seed(999)
        return statistics.fmean(
            float(self.loss(model, self.draw(self.valid, generator))) for _ in range(batches)
        )

    def run(self, job: Job) -> dict[str, Any]:
        """Train once; the seed decides the weights and the batches, the same for every method."""
        torch.manual_seed(job.seed)
        model = Llama(*SIZES[job.size], tokens=self.tokens).to(self.device)
        optimizer = self.methods[job.method].make(model, job.lr)
        steps = max(2, job.num_bytes // (self.batch * self.tokens))
        warmup = max(1, steps // 20)
        generator = torch.Generator().manual_seed(1000 + job.seed)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: factor(s, steps, warmup))
        curve, begin, training_s = [], time.perf_counter(), 0.0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(steps):
            self.loss(model, self.draw(self.train, generator)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                training_s += time.perf_counter() - begin
                curve.append(
                    [(step + 1) * self.batch * self.tokens, self.validate(model), training_s]
                )
                if not math.isfinite(curve[-1][1]):
                    break
                begin = time.perf_counter()
        return {
            "loss": curve[-1][1], "curve": curve, "train_s": training_s, "steps": steps,
            "state_bytes": state_bytes(optimizer), "parameters": sum(p.numel() for p in model.parameters()),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else 0,
        }  # fmt: skip


def factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of optimizer state."""
    if isinstance(optimizer, Frugal):
        return optimizer.state_bytes()
    tensors = [
        v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def plan(trainer: Trainer, options: argparse.Namespace, runs: dict[str, Any]) -> Iterator[Job]:
    """Yield what is still to do: each size's grids first, then its seeds at the chosen rates."""
    for size in options.sizes:
        seeds = options.seeds if size == options.sizes[0] else 1
        for name in options.methods or trainer.methods:
            for lr in trainer.methods[name].grid:
                yield Job(size=size, method=name, lr=lr, seed=0, num_bytes=options.bytes // 10)
        for seed in range(seeds):
            for name in options.methods or trainer.methods:
                lr = best_rate(runs, size, name, options.bytes // 10)
                if lr is not None:
                    yield Job(size=size, method=name, lr=lr, seed=seed, num_bytes=options.bytes)


def best_rate(runs: dict[str, Any], size: str, method: str, num_bytes: int) -> float | None:
    """Return the grid's best learning rate among finite losses."""
    wanted = (size, method, num_bytes)
    alike = [r for r in runs.values() if (r["size"], r["method"], r["num_bytes"]) == wanted]
    found = [(r["loss"], r["lr"]) for r in alike if math.isfinite(r["loss"])]
    return min(found)[1] if found else None


def train_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Run what is missing while time is left."""
    begin = time.perf_counter()
    trainer = Trainer(options)
    if results.get("text_digest", trainer.digest) != trainer.digest:
        raise SystemExit("the result file is of another text: change --out, or use its --bytes")
    results.update(
        text_digest=trainer.digest, text_bytes=len(trainer.train), torch=torch.__version__,
        device=torch.cuda.get_device_name() if trainer.device == "cuda" else "cpu",
        command=" ".join(sys.argv),
    )  # fmt: skip
    runs, last_s = results.setdefault("runs", {}), 0.0
    for job in plan(trainer, options, runs):
        if job.key in runs:
            continue
        like = [
            r["wall_s"]
            for r in runs.values()
            if (r["size"], r["num_bytes"]) == (job.size, job.num_bytes)
        ]
        last_s = max(like, default=last_s)
        if time.perf_counter() - begin + last_s > options.limit_s:
            sys.stdout.write(f"time is up before {job.key}\n")
            return
        start = time.perf_counter()
        runs[job.key] = {**vars(job), **trainer.run(job), "wall_s": time.perf_counter() - start}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        done = runs[job.key]
        sys.stdout.write(f"{job.key}: {done['loss']:.4f} in {done['wall_s']:.0f} s\n")
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------- results
def summary(results: dict[str, Any], full_bytes: int) -> dict[str, Any]:
    """Return mean loss and spread of every (size, method), and the share of GaLore's gap closed."""
    found: dict[str, Any] = {}
    for run in results.get("runs", {}).values():
        if run["num_bytes"] == full_bytes:
            found.setdefault(run["size"], {}).setdefault(run["method"], []).append(run)
    table: dict[str, Any] = {}
    grids = {name: method.grid for name, method in methods(1).items()}
    for size, by_method in found.items():
        table[size] = {name: _row(group, grids[name]) for name, group in by_method.items()}
        losses = {name: row["loss"] for name, row in table[size].items()}
        if {"AdamW", "GaLore 0.25", "FRUGAL 0.25"} <= losses.keys():
            gap = losses["GaLore 0.25"] - losses["AdamW"]
            closed = losses["GaLore 0.25"] - losses["FRUGAL 0.25"]
            table[size]["gap closed by FRUGAL 0.25 (claim: 0.8)"] = closed / gap
    return table


def _row(group: list[dict[str, Any]], grid: tuple[float, ...]) -> dict[str, Any]:
    losses = [run["loss"] for run in group]
    rate = group[0]["lr"]
    return {
        "loss": statistics.fmean(losses), "spread": max(losses) - min(losses), "seeds": len(group),
        "lr": rate, "lr_at_edge_of_grid": rate in (grid[0], grid[-1]),
        "state_bytes": group[0]["state_bytes"],
        "train_s": statistics.median(run["train_s"] for run in group),
    }  # fmt: skip


def draw(results: dict[str, Any], full_bytes: int, path: Path) -> None:
    """Draw loss against bytes, time and state."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    runs = [r for r in results["runs"].values() if r["num_bytes"] == full_bytes and r["seed"] == 0]
    size = runs[0]["size"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for number, run in enumerate(r for r in runs if r["size"] == size):
        seen, losses, seconds = zip(*run["curve"], strict=True)
        axes[0].plot(
            [b / 1e6 for b in seen],
            losses,
            color=f"C{number}",
            label=f"{run['method']}, lr {run['lr']:g}",
        )
        axes[1].plot(seconds, losses, color=f"C{number}")
        axes[2].scatter(run["state_bytes"] / 2**20, run["loss"], color=f"C{number}")
        axes[2].annotate(
            run["method"],
            (run["state_bytes"] / 2**20, run["loss"]),
            textcoords="offset points",
            xytext=(5, 5),
        )
    for axis, label in zip(
        axes,
        ("million bytes of text", "seconds of training", "MiB of optimizer state"),
        strict=True,
    ):
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss, nats a byte")
        axis.grid(alpha=0.3)
    low = min(run["loss"] for run in runs)
    for axis in axes[:2]:
        axis.set_ylim(low - 0.02, low + 0.5)
    axes[0].legend()
    figure.suptitle(f"byte-level LLaMA {size}, {results['device']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse arguments; train or draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="result file, also what to continue"
    )
    parser.add_argument(
        "--limit-s", type=float, default=540.0, help="start no run that would end later"
    )
    parser.add_argument("--bytes", type=int, default=300_000_000, help="text to train on, in bytes")
    parser.add_argument("--sizes", nargs="+", default=["10M"], choices=list(SIZES))
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds of the first size (others: one)"
    )
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--plot", type=Path, help="draw the results instead of training")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.plot:
        draw(results, options.bytes, options.plot)
    else:
        train_all(options, results)
        results["summary"] = summary(results, options.bytes)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(json.dumps(summary(results, options.bytes), indent=1) + "\n")


if __name__ == "__main__":
    main()
