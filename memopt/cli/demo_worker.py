"""One run of the demo, in a process of its own: `python -m memopt.cli.demo_worker CONFIG`.

Trains a byte-level Llama on the sources of Python's standard library, plain or under memopt, and writes one JSON
object per line to stdout: what it is about to train, each step, and at the end the peaks, a digest of all weights and
memory over time. Anything that a library prints goes to stderr instead.

Both runs measure themselves by the same means, outside memopt's own: `AccountedMemory` around everything (every tensor
is born under it, parameters and optimizer state included) and the process's resident set. memopt's staging buffers are
no tensors; they count against its budget, so they are added to its run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

import memopt
from memopt.memory.accounting import AccountedMemory
from memopt.memory.host import peak_resident_bytes, resident_bytes

NUM_SOURCE_FILES = 100
VOCABULARY = 256  # one token per byte value
SAMPLE_PERIOD_S = 0.02


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What one worker trains; `device_bytes` None: the plain loop.

    The shapes put 10 million parameters (154 MiB with gradients and AdamW's state) below 4,096 tokens a step, so that
    activations are most of the plain step's peak, as they are for large models.
    """

    num_steps: int = 8
    num_threads: int = 1
    device_bytes: int | None = None
    ssd: str | None = None
    report_file: str | None = None
    num_layers: int = 10
    hidden_size: int = 288
    intermediate_size: int = 768
    num_heads: int = 6
    batch_size: int = 4
    sequence_length: int = 1024
    learning_rate: float = 1e-3
    seed: int = 0


def training_text() -> torch.Tensor:
    """Return the standard library's own sources as bytes, [num_bytes] uint8."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:NUM_SOURCE_FILES]
    return torch.frombuffer(
        bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8
    )


def build_model(config: DemoConfig) -> torch.nn.Module:
    """Return a Llama with random weights, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    model: torch.nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.sequence_length,
        )
    )
    return model.train()


def batches(config: DemoConfig) -> Iterator[torch.Tensor]:
    """Yield `num_steps` batches of random places in the text, [batch_size, sequence_length] int64."""
    text = training_text()
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_steps):
        last = len(text) - config.sequence_length
        starts = torch.randint(last, (config.batch_size,), generator=generator).tolist()
        yield torch.stack([text[start : start + config.sequence_length] for start in starts]).long()


class MemoryOverTime(threading.Thread):
    """Samples (seconds, accounted bytes, resident bytes); accounted is the largest since the sample before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int, int]] = []
        self.beside: Callable[[], int] = int
        """Bytes that are no tensor's and count all the same."""
        self._largest_bytes = 0
        self._finished = threading.Event()

    def saw(self, accounted_bytes: int) -> None:
        """Take note of a level between two samples (AccountedMemory calls this)."""
        self._largest_bytes = max(self._largest_bytes, accounted_bytes)

    def follow(self, accounted: AccountedMemory) -> None:
        """Begin to sample."""
        self._accounted = accounted
        self._start_s = time.perf_counter()
        self.start()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._finished.wait(SAMPLE_PERIOD_S):
            level, self._largest_bytes = self._largest_bytes, 0
            level = max(level, self._accounted.current_bytes) + self.beside()
            elapsed_s = time.perf_counter() - self._start_s
            self.samples.append((round(elapsed_s, 3), level, resident_bytes()))

    def stop(self) -> None:
        """End the thread."""
        self._finished.set()
        self.join()


def digest(model: torch.nn.Module) -> str:
    """Return a checksum of all parameters and buffers, names included."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        checksum.update(name.encode())
        checksum.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


def train(config: DemoConfig, emit: Any) -> None:
    """Train and report every step; the loop inside is the same with and without memopt."""
    torch.set_num_threads(config.num_threads)
    over_time = MemoryOverTime()
    with AccountedMemory(on_sample=over_time.saw) as accounted:
        model = build_model(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        emit(
            "start",
            num_parameters=num_parameters,
            num_threads=torch.get_num_threads(),
            versions={name: version(name) for name in ("memopt", "torch", "transformers")},
        )
        over_time.follow(accounted)
        context: Any = contextlib.nullcontext()
        if config.device_bytes is not None:
            budget = memopt.Budget(device=config.device_bytes, ssd=config.ssd)
            context = memopt.optimize(model, optimizer, budget=budget)
        start_s = time.perf_counter()
        with context as run:
            if run is not None:
                over_time.beside = run._resources.beside_bytes
            for step, tokens in enumerate(batches(config)):
                step_start_s, cpu_start_s = time.perf_counter(), time.process_time()
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step_s = time.perf_counter() - step_start_s
                cpu_s = time.process_time() - cpu_start_s  # all threads: steadier on a busy machine
                emit("step", step=step, loss=loss.item(), step_s=step_s, cpu_s=cpu_s)
        train_s = time.perf_counter() - start_s
        peak_bytes = accounted.peak_bytes
    over_time.stop()
    if run is not None:
        report = run.report()
        peak_bytes = max(peak_bytes, report.measured.device_bytes or 0)
        if config.report_file is not None:
            report.save(config.report_file)
    emit(
        "end",
        train_s=train_s,
        accounted_peak_bytes=peak_bytes,
        resident_peak_bytes=peak_resident_bytes(),
        weights_digest=digest(model),
        samples=over_time.samples,
    )


def private_stdout() -> TextIO:
    """Return the process's stdout and let everybody else's writes to it go to stderr."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lines


def main() -> None:
    """Run the configuration given as JSON in the first argument."""
    lines = private_stdout()

    def emit(event: str, **fields: Any) -> None:
        lines.write(json.dumps({"event": event, **fields}) + "\n")

    try:
        train(DemoConfig(**json.loads(sys.argv[1])), emit)
    except (
        memopt.ConfigError,
        memopt.BudgetError,
    ) as error:  # a budget that cannot be kept: a sentence, no traceback
        emit("refused", message=str(error))
        sys.exit(1)


def command(config: DemoConfig) -> list[str]:
    """Return the command line that runs `config` in a new process."""
    return [sys.executable, "-m", "memopt.cli.demo_worker", json.dumps(asdict(config))]


if __name__ == "__main__":
    main()
