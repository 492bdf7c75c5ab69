"""Quality of FRUGAL and its rivals: byte-level LLaMAs trained on text that is on the machine.

    python benchmarks/bench_frugal_quality.py --out quality.json --limit-s 540   # again to continue
    python benchmarks/bench_frugal_quality.py --out quality.json --report        # table and picture

Every method sees the same batches from the same first weights. A curve's points are the loss on the
first 8 of the 48 validation batches that the final loss is computed on. Each method's learning rate is chosen
from a grid of three on a tenth of the data (one seed); a best rate at the grid's edge extends the
grid by one. Then every seed is trained in full at that rate: linear warm-up over 5 %, cosine to a
tenth, no weight decay, no clipping (the recipe of FRUGAL's paper). `--refine` trains the neighbours
of the chosen rates in full, too, and takes the best of those.

The result file is what a next call continues: finished runs are skipped, runs that the time limit
cut off are kept under "unfinished" with their curve and started anew. A run starts only if it should
end before the limit, by what runs have taken so far; what fits is taken out of order.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _byte_llama import SIZES, Llama, Programs  # noqa: E402
from _byte_text import Corpus, load_corpus  # noqa: E402
from _common import command, commit, write_json  # noqa: E402
from _quality_methods import CORE, EXTRA, methods, state_bytes  # noqa: E402
from _quality_report import best_rate, draw, full_rate, markdown, summary  # noqa: E402

GRID_SHARE, GRID_RATIO, LONGEST_GRID = 0.1, 3.0, 5
CURVE_STEPS, CURVE_POINTS, CURVE_BATCHES, LAST_BATCHES = 100, 20, 8, 48


# ----------------------------------------------------------------------------------------- jobs
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
        return f"{self.size}|{self.method}|{self.lr:.3g}|{self.seed}|{self.num_bytes}"


class Plan:
    """What is still to be run, most wanted first; changes as results come in."""

    def __init__(self, options: argparse.Namespace, runs: dict[str, Any]) -> None:
        self.options, self.runs = options, runs
        self.grid_bytes = int(options.bytes * GRID_SHARE)
        self.grids = {name: method.grid for name, method in methods(options.gap).items()}
        wanted = options.methods or [name for name in self.grids if name not in EXTRA]
        self.core = [name for name in CORE if name in wanted]
        self.others = [name for name in wanted if name not in CORE]

    def jobs(self) -> Iterator[Job]:
        """Yield jobs without a result: grids, one seed of each, the claim's other seeds, the rest."""
        for job in self._wanted():
            if job.key not in self.runs:
                yield job

    def _wanted(self) -> Iterator[Job]:
        for size in self.options.sizes:
            seeds = range(self.options.seeds if size == self.options.sizes[0] else 1)
            if self.options.only_seeds is not None:
                seeds = [seed for seed in self.options.only_seeds if seed in seeds]
            for names in (self.core, self.others):
                for name in names:
                    yield from self._grid(size, name)
                if 0 in seeds and not self.options.grid_only:
                    yield from self._full(size, names, 0)
            if self.options.grid_only:
                continue
            for names in (self.core, self.others):
                for seed in seeds:
                    yield from self._full(size, names, seed)
            if self.options.refine:
                for name in (*self.core, *self.others):
                    yield from self._refined(size, name)

    def _grid(self, size: str, name: str) -> Iterator[Job]:
        rates = sorted(self.grids[name])
        best = best_rate(self.runs, size, name, self.grid_bytes)
        tried = [rate for rate in self._tried(size, name) if rate not in rates]
        rates = sorted({*rates, *tried})
        whole = all(
            self._job(size, name, rate, 0, self.grid_bytes).key in self.runs for rate in rates
        )
        if whole and best is not None and len(rates) < LONGEST_GRID:
            if best == rates[0]:
                rates.append(best / GRID_RATIO)
            elif best == rates[-1]:
                rates.append(best * GRID_RATIO)
        for rate in rates:
            yield self._job(size, name, rate, 0, self.grid_bytes)

    def _tried(self, size: str, name: str) -> list[float]:
        wanted = (size, name, self.grid_bytes)
        return [
            r["lr"]
            for r in self.runs.values()
            if (r["size"], r["method"], r["num_bytes"]) == wanted
        ]

    def _full(self, size: str, names: list[str], seed: int) -> Iterator[Job]:
        for name in names:
            if any(job.key not in self.runs for job in self._grid(size, name)):
                continue  # the grid may not fit into the time left; nothing is trained untuned
            rate = full_rate(self.runs, size, name, self.grid_bytes, self.options.bytes)
            if rate is not None:
                yield self._job(size, name, rate, seed, self.options.bytes)

    def _refined(self, size: str, name: str) -> Iterator[Job]:
        rate = full_rate(self.runs, size, name, self.grid_bytes, self.options.bytes)
        if rate is not None:
            for other in (rate / GRID_RATIO, rate * GRID_RATIO):
                yield self._job(size, name, other, 0, self.options.bytes)

    @staticmethod
    def _job(size: str, name: str, lr: float, seed: int, num_bytes: int) -> Job:
        return Job(size=size, method=name, lr=float(f"{lr:.3g}"), seed=seed, num_bytes=num_bytes)

    def seconds(self, job: Job, guess: float) -> float:
        """Return what a job should take: by its method's runs, else its size's, else `guess` a byte."""
        alike = [r for r in self.runs.values() if r["size"] == job.size and "wall_s" in r]
        same = [r for r in alike if r["method"] == job.method]
        rates = [r["wall_s"] / r["num_bytes"] for r in same]
        if rates:
            return 1.04 * min(rates) * job.num_bytes
        rates = [r["wall_s"] / r["num_bytes"] for r in alike]
        return 1.3 * (statistics.median(rates) if rates else guess) * job.num_bytes


# ----------------------------------------------------------------------------------------- training
class Trainer:
    """Data, programs and settings of all runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.tokens, self.batch = options.tokens, options.batch
        self.methods = methods(options.gap)
        self.programs = Programs(compiled=options.compile == "yes")
        self.guess: dict[str, float] = {}  # seconds a byte, by size
        builder = self._build_library()
        with ThreadPoolExecutor(1) as pool:  # text is read while the programs are compiled
            loading = pool.submit(load_corpus, options.bytes)
            for size in options.sizes:
                self.guess[size] = self._warm_up(size)
            self.corpus: Corpus = loading.result()
        self.train = self.corpus.train.to(self.device)
        self.valid = self.corpus.valid.to(self.device)
        self.library = self._library(builder)

    def _build_library(self) -> subprocess.Popen[bytes] | None:
        missing = not (ROOT / ".native/libmemopt_cuda.so").exists()
        if self.device == "cpu" or not missing:
            return None
        return subprocess.Popen([sys.executable, str(ROOT / "tools/build_cuda.py")])

    def _library(self, builder: subprocess.Popen[bytes] | None) -> str:
        if builder is not None:
            builder.wait()
        from memopt.ops import cuda_status

        status = cuda_status()
        return (status.reason or status.build).replace(f"{ROOT}/", "")

    def model(self, size: str) -> Llama:
        """Make a model from torch's random numbers as they are."""
        return Llama(size, self.tokens, self.programs, self.dtype).to(self.device)

    def _warm_up(self, size: str) -> float:
        """Compile for a size, or find that this cannot be done; return seconds a byte of a step."""
        model = self.model(size)
        text = torch.randint(256, (self.batch, self.tokens + 1), device=self.device)
        try:
            model(text).backward()
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises, training can go on
            self.programs.give_up(error)
        repeats = 5 if self.device == "cuda" else 1
        for repeat in range(1 + repeats):
            if repeat == 1:
                self.sync()
                begin = time.perf_counter()
            model(text).backward()
        self.sync()
        return (time.perf_counter() - begin) / (repeats * self.batch * self.tokens)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def cut(self, data: Tensor, starts: Tensor) -> Tensor:
        """Return [batch, tokens + 1] of text from `starts`."""
        where = starts.unsqueeze(1) + torch.arange(self.tokens + 1, device=self.device)
        return data[where].long()

    def starts(self, data: Tensor, count: int, seed: int) -> Tensor:
        """Draw the places of `count` batches, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(
            len(data) - self.tokens - 1, (count, self.batch), generator=generator
        )
        return places.to(self.device)

    def validate(self, model: Llama, batches: int) -> tuple[float, float]:
        """Return the loss on fixed places of the validation text, by the program that trains.

        First on the batches that all points of a curve are computed on, then on all of them.
        """
        starts = self.starts(self.valid, batches, 999)
        losses = torch.stack([model(self.cut(self.valid, row)).detach() for row in starts]).double()
        return float(losses[:CURVE_BATCHES].mean()), float(losses.mean())

    def run(
        self, job: Job, deadline: float, note: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Train once; the seed decides the weights and the batches, the same for every method.

        `note` is called with what there is so far at every point of the curve. The result has
        "cut_off" when the deadline came first.
        """
        torch.manual_seed(job.seed)
        model = self.model(job.size)
        optimizer = self.methods[job.method].make(model, job.lr)
        steps = max(2, job.num_bytes // (self.batch * self.tokens))
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: factor(s, steps))
        starts = self.starts(self.train, steps, 1000 + job.seed)
        result: dict[str, Any] = {
            "curve": [], "train_s": 0.0, "steps": steps, "text_digest": self.corpus.digest,
            "curve_batches": CURVE_BATCHES, "loss_batches": LAST_BATCHES,
            "epochs": steps * self.batch * self.tokens / len(self.train),
            "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stride = max(1, min(CURVE_STEPS, steps // 4), steps // CURVE_POINTS)
        self.sync()
        begin = time.perf_counter()
        for step in range(steps):
            model(self.cut(self.train, starts[step])).backward()
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            last = step + 1 == steps
            if not last and (step + 1) % stride:
                continue
            self.sync()
            result["train_s"] += time.perf_counter() - begin
            point, loss = self.validate(model, LAST_BATCHES if last else CURVE_BATCHES)
            seen = (step + 1) * self.batch * self.tokens
            result["curve"].append([seen, point, result["train_s"]])
            result |= {"loss": loss, "state_bytes": state_bytes(optimizer)}
            if self.device == "cuda":
                result["peak_bytes"] = torch.cuda.max_memory_allocated()
            if not math.isfinite(loss):
                return result | {"loss": math.inf, "diverged": True}
            if not last and time.perf_counter() > deadline:
                return result | {"cut_off": True}
            note(result)
            begin = time.perf_counter()
        return result


def factor(step: int, steps: int) -> float:
    """Linear warm-up over 5 %, cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------- the loop
def train_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Run what is missing while time is left; the result file is replaced after every point."""
    begin = time.perf_counter()
    deadline = begin + options.limit_s
    trainer = Trainer(options)
    corpus, runs = trainer.corpus, results["runs"]
    device = torch.cuda.get_device_name() if trainer.device == "cuda" else "cpu"
    session = {
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": command(sys.argv),
        "commit": commit(), "torch": torch.__version__, "device": device,
        "text_bytes": len(corpus.train), "text_files": corpus.num_files, "text_digest": corpus.digest,
        "programs": trainer.programs.note, "kernels": trainer.library,
        "start_s": time.perf_counter() - begin, "guess_tokens_per_s": {k: 1 / v for k, v in trainer.guess.items()},
    }  # fmt: skip
    results["sessions"].append(session)
    say(json.dumps(session, indent=1))
    plan = Plan(options, runs)
    while True:
        left = deadline - time.perf_counter()
        jobs = list(plan.jobs())
        job = next((j for j in jobs if plan.seconds(j, trainer.guess[j.size]) < left), None)
        if job is None:
            say(
                f"{len(jobs)} runs to do, none fits into the {left:.0f} s that are left"
                if jobs
                else "all is done"
            )
            return
        run_job(trainer, job, deadline, results, options.out)


def run_job(
    trainer: Trainer, job: Job, deadline: float, results: dict[str, Any], out: Path
) -> None:
    """Train one job and put it where it belongs in the results."""
    start = time.perf_counter()

    def note(partial: dict[str, Any]) -> None:
        results["unfinished"][job.key] = {**vars(job), **partial}
        write_json(out, results)

    done = {**vars(job), **trainer.run(job, deadline, note), "wall_s": time.perf_counter() - start}
    done["tokens_per_s"] = done["curve"][-1][0] / max(1e-9, done["train_s"])
    results["unfinished"].pop(job.key, None)
    results["unfinished" if done.get("cut_off") else "runs"][job.key] = done
    write_json(out, results)
    cut = " CUT OFF" if done.get("cut_off") else ""
    say(
        f"{job.key}: {done['loss']:.4f} in {done['wall_s']:.1f} s, {done['tokens_per_s'] / 1e6:.2f} M tokens/s{cut}"
    )


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Read and join the result files that are there; refuse settings that do not fit them."""
    settings = {name: getattr(options, name) for name in ("bytes", "tokens", "batch", "gap")}
    results: dict[str, Any] = {"settings": settings, "sessions": [], "runs": {}, "unfinished": {}}
    for path in dict.fromkeys([*options.resume, options.out]):
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            raise SystemExit(f"{path} was made with {found['settings']}, this call is {settings}")
        results["sessions"] += [s for s in found["sessions"] if s not in results["sessions"]]
        for kind in ("runs", "unfinished"):
            results[kind] |= found[kind]
    return results


def main() -> None:
    """Parse arguments; train or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="result file, continued if it is there"
    )
    parser.add_argument(
        "--resume", type=Path, nargs="*", default=[], help="more results to continue"
    )
    parser.add_argument("--limit-s", type=float, default=540.0, help="be done after this time")
    parser.add_argument("--bytes", type=int, default=300_000_000, help="text to train on")
    parser.add_argument("--sizes", nargs="+", default=["10M"], choices=list(SIZES))
    parser.add_argument("--seeds", type=int, default=3, help="of the first size (others: one)")
    parser.add_argument(
        "--only-seeds", nargs="+", type=int, help="of these: one call a GPU, joined by --resume"
    )
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--compile", choices=["yes", "no"], default="yes")
    parser.add_argument("--refine", action="store_true", help="neighbouring rates in full, too")
    parser.add_argument(
        "--grid-only", action="store_true", help="no run in full: which rates are good"
    )
    parser.add_argument("--report", action="store_true", help="table (.md) and picture (.png) only")
    options = parser.parse_args()
    results = load(options)
    if not options.report:
        train_all(options, results)
    results["summary"] = summary(results, GRID_SHARE)
    write_json(options.out, results)
    if results["summary"]:
        options.out.with_suffix(".md").write_text(markdown(results))
        draw(results, options.out.with_suffix(".png"))
    say(markdown(results))


if __name__ == "__main__":
    main()
