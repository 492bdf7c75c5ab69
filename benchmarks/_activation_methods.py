"""The ways to make a step's activations smaller that bench_activations.py compares, each as its users call it.

A method is a context manager around the whole loop. It gets the model and yields an `Attached`: the context to put
around each step (forward and backward), and a function that returns what the method says of itself afterwards.
Peers are called through their own public functions with their own defaults; no peer's code is here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from _common import parse_bytes

Saved = Literal["device", "host", "inputs", "planned"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: `tokens` in one sequence, a method, for memopt its plan and its device budget."""

    tokens: int
    method: str
    plan: str = ""
    device_budget: str = ""
    num_untimed: int = 1
    num_timed: int = 3

    @property
    def label(self) -> str:
        """The row without its tokens, as `--rows` takes it."""
        plan = f"={self.plan}" if self.plan else ""
        return f"{self.method}{plan}" + (f"@{self.device_budget}" if self.device_budget else "")


SETTLING_STEPS = 4
"""memopt traces one step, locks host memory beside the next ones, times one, and plans again after it."""


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A method at work: a context for each step, and what it reports after the loop."""

    step_context: Callable[[], AbstractContextManager[Any]]
    report: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a method needs besides the model: memopt's host and SSD budgets."""

    host_budget: str
    ssd_budget: str


Attach = Callable[[Any, Row, Settings], AbstractContextManager[Attached]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way. `saved` says where a plain step's saved tensors go, so that hopeless rows are not tried.

    "device": they stay; "host": all of them are copied out; "inputs": only each layer's input is kept, on the device
    or the host; "planned": memopt decides.
    """

    attach: Attach
    saved: Saved
    about: str
    needs_cuda: bool = False


@contextlib.contextmanager
def _plain(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    yield Attached(step_context=nullcontext)


def _enable_checkpointing(model: Any, *, offload: bool) -> None:
    """Turn on transformers' own checkpointing, by the newer of its two names where there is one."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    more = {"offload": True} if offload else {}
    if newer is not None:
        newer({"use_reentrant": False}, **more)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False}, **more)


@contextlib.contextmanager
def _checkpoint(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    _enable_checkpointing(model, offload=False)
    yield Attached(step_context=nullcontext)


@contextlib.contextmanager
def _transformers_offload(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    _enable_checkpointing(model, offload=True)
    yield Attached(step_context=nullcontext)


@contextlib.contextmanager
def _save_on_cpu(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    from torch.autograd.graph import save_on_cpu

    yield Attached(step_context=lambda: save_on_cpu(pin_memory=True))


def load_trl_offloading() -> Any:
    """Return trl's module of activation offloading, loaded by its path.

    Importing it as `trl.models.activation_offloading` imports all of trl's trainers' needs (datasets and more); the
    module itself needs psutil, accelerate and transformers only.
    """
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("trl is not installed", name="trl")
    path = Path(found.submodule_search_locations[0]) / "models" / "activation_offloading.py"
    spec = importlib.util.spec_from_file_location("trl_activation_offloading", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded", name="trl")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _trl(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    import accelerate  # type: ignore[import-untyped]

    accelerate.PartialState()  # trl logs through accelerate, whose logger raises without a state
    module = load_trl_offloading()
    logging.getLogger(module.__name__).setLevel(
        logging.ERROR
    )  # it warns for every tensor once memory is 60 % full
    manager = module.get_act_offloading_ctx_manager(model)
    yield Attached(step_context=lambda: manager)


@contextlib.contextmanager
def _trl_checkpoint(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    with _checkpoint(model, row, settings), _trl(model, row, settings) as attached:
        yield attached


@contextlib.contextmanager
def _deepspeed_offload(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    from dataclasses import asdict

    from deepspeed.runtime.activation_checkpointing import offload_activations

    manager = offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager()
    with _checkpoint(model, row, settings):
        yield Attached(step_context=lambda: manager, report=lambda: asdict(manager.stats))


@contextlib.contextmanager
def _memopt(model: Any, row: Row, settings: Settings) -> Iterator[Attached]:
    import memopt

    budget = memopt.Budget(
        device=row.device_budget or None,
        host=settings.host_budget or None,
        ssd=settings.ssd_budget or None,
    )
    with memopt.optimize(model, budget=budget, plan=row.plan or "auto") as run:

        def report() -> dict[str, Any]:
            return {
                "report": run.report().to_dict(),
                "plan": run.plan.to_dict(),
                "trace": run.trace.to_dict() if run.trace is not None else None,
            }

        yield Attached(step_context=nullcontext, report=report)


METHODS = {
    "plain": Method(attach=_plain, saved="device", about="nothing: autograd keeps what it needs"),
    "checkpoint": Method(
        attach=_checkpoint,
        saved="inputs",
        about="transformers' gradient_checkpointing_enable, non-reentrant",
    ),
    "memopt": Method(
        attach=_memopt, saved="planned", about="memopt.optimize with a device and a host budget"
    ),
    "trl_checkpoint": Method(
        attach=_trl_checkpoint,
        saved="inputs",
        needs_cuda=True,
        about="checkpointing inside TRL's OffloadActivations, as its trainers combine them",
    ),
    "transformers_offload": Method(
        attach=_transformers_offload,
        saved="inputs",
        needs_cuda=True,  # it pins whatever the device is
        about="transformers' checkpointing with offload=True: save_on_cpu around each checkpoint",
    ),
    "deepspeed_offload": Method(
        attach=_deepspeed_offload,
        saved="inputs",
        about="checkpointing inside DeepSpeed's CheckpointHiddenStatesOffload",
    ),
    "trl": Method(
        attach=_trl,
        saved="host",
        needs_cuda=True,
        about="TRL's OffloadActivations alone: every saved tensor moves",
    ),
    "save_on_cpu": Method(
        attach=_save_on_cpu,
        saved="host",
        about="torch.autograd.graph.save_on_cpu(pin_memory=True) around the forward",
    ),
}


def parse_row(text: str, *, budgets: dict[int, str], num_steps: dict[int, tuple[int, int]]) -> Row:
    """Return the row written as TOKENS:METHOD[=PLAN][@DEVICE_BUDGET].

    Args:
        text: "16384:memopt@39GiB", "65536:checkpoint", "16384:memopt=recompute" ...
        budgets: device budget of memopt's rows by tokens, where the row names none.
        num_steps: (untimed, timed) steps by tokens, under 0 for all others; memopt has more untimed ones.

    Raises:
        ValueError: no such method, a plan or budget for a peer, or no budget known for memopt.

    """
    head, at, budget = text.partition("@")
    tokens_text, colon, method_text = head.partition(":")
    method, equals, plan = method_text.partition("=")
    if not colon or not tokens_text.isdigit() or method not in METHODS:
        raise ValueError(
            f"row {text!r}: write TOKENS:METHOD[=PLAN][@DEVICE_BUDGET]; methods: {', '.join(METHODS)}"
        )
    tokens = int(tokens_text)
    if method == "memopt":
        budget = budget or budgets.get(tokens, "")
        if not budget:
            raise ValueError(
                f"row {text!r}: no device budget is known at {tokens} tokens; write {text}@39GiB or such"
            )
        parse_bytes(budget)
    elif at or equals:
        raise ValueError(f"row {text!r}: only memopt takes a plan and a budget")
    num_untimed, num_timed = num_steps[tokens] if tokens in num_steps else num_steps[0]
    if method == "memopt":
        num_untimed += SETTLING_STEPS
    return Row(
        tokens=tokens,
        method=method,
        plan=plan,
        device_budget=budget,
        num_untimed=num_untimed,
        num_timed=num_timed,
    )
