"""Every model family, every placement: three steps under memopt leave the bits of the plain loop.

The fast set runs each model under every placement, with dropout and autocast dealt out so that each model meets each
of the four combinations; `-m slow` runs the whole cross product with more seeds.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from _bitwise import (
    CPU_PLACEMENTS,
    Program,
    assert_bitwise,
    assert_bitwise_for_single_ops,
    compare,
    kept_plan,
    notes_of,
    plain_run,
    plan_for,
    run_memopt,
    some,
    trace_of,
)
from _models import MODELS, TOKENS, _llama, ids, model_program
from torch import nn

import memopt

SWITCHES = ((False, False), (True, False), (False, True), (True, True))
FAST = [
    (name, placement, *SWITCHES[(number + place) % 4])
    for number, name in enumerate(MODELS)
    for place, placement in enumerate(CPU_PLACEMENTS)
]
SLOW = [
    (name, placement, *switches)
    for name, placement, switches in itertools.product(
        MODELS, (*CPU_PLACEMENTS, "mix-2", "mix-3"), SWITCHES
    )
    if (name, placement, *switches) not in FAST
]
NUM_REGIONS = {"t5": 4, "cnn": 2}  # at least; every other model has three blocks


def _check(name, placement, dropout, autocast):
    program = model_program(name, dropout=dropout, autocast=autocast)
    record = assert_bitwise(program, placement)
    regions = record.run.trace.regions
    assert len(regions) >= NUM_REGIONS.get(name, 3), [region.name for region in regions]
    if placement in ("kept", "ssd"):
        placed = {op.placement for region in record.run.plan.regions for op in region.ops}
        wanted = {"kept": "device", "ssd": "ssd"}[placement]
        assert wanted in placed, f"the plan in force places nothing: {placed}"
    if placement == "ssd":
        assert record.run.report().to_dict()["measured"]["ssd_bytes"] > 0


@pytest.mark.parametrize(("name", "placement", "dropout", "autocast"), FAST)
def test_model(name, placement, dropout, autocast):
    _check(name, placement, dropout, autocast)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "placement", "dropout", "autocast"), SLOW)
def test_model_cross_product(name, placement, dropout, autocast):
    _check(name, placement, dropout, autocast)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_whichever_op_is_kept(name):
    assert_bitwise_for_single_ops(model_program(name, dropout=True, autocast=False), limit=30)


@pytest.mark.parametrize("placement", some("kept", "ssd", "mix-0"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, placement):
    program = _in_dtype(dtype)
    assert_bitwise(program, placement)


@functools.cache
def _in_dtype(dtype):
    base = model_program("llama", dropout=True)
    return Program(build=lambda: base.build().to(dtype), step=base.step)


@pytest.mark.parametrize("placement", some("kept", "ssd", "mix-0"))
def test_eager_attention(placement):
    """Attention as single ops: S x S scores, a mask that is added, softmax in float32, dropout."""
    assert_bitwise(EAGER_ATTENTION, placement)


def _eager_attention():
    model = _llama(0.1)
    model.set_attn_implementation("eager")
    return model


EAGER_ATTENTION = Program(build=_eager_attention, step=model_program("llama").step)


@pytest.mark.parametrize("placement", some("kept", "ssd", "mix-0"))
def test_strict_is_as_exact(placement):
    record = assert_bitwise(model_program("llama", dropout=True), placement, strict=True)
    assert record.run.report() is not None


@pytest.mark.parametrize("placement", some("kept", "ssd", "mix-0"))
def test_channels_last_images(placement):
    assert_bitwise(CHANNELS_LAST, placement)


def _channels_last():
    return model_program("cnn").build().to(memory_format=torch.channels_last)


def _channels_last_step(model, i):
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(i))
    loss = model(images.to(memory_format=torch.channels_last)).square().mean()
    loss.backward()
    return loss


CHANNELS_LAST = Program(build=_channels_last, step=_channels_last_step)


# ------------------------------------------------------------------------------------- how regions are found or given
GIVEN = {
    "names": ["model.layers"],
    "single names": ["model.layers.0", "model.layers.2"],
    "predicate": lambda name, module: type(module).__name__ == "LlamaMLP",
    "nested": lambda name, module: name.endswith(("self_attn", "mlp")),
}


@pytest.mark.parametrize("how", [*GIVEN, "modules"])
@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd"])
def test_given_regions(how, placement):
    base = model_program("llama", dropout=True)
    program = Program(build=base.build, step=base.step, regions=GIVEN.get(how))
    expected = {"names": 3, "single names": 2, "predicate": 3, "nested": 6, "modules": 2}[how]
    if how != "modules":
        record = assert_bitwise(program, placement)
    else:
        record = _with_modules(program, placement)
        compare(plain_run(program), record)
    assert len(record.run.trace.regions) == expected


def _with_modules(program, placement):
    """`regions` as a list of the modules themselves, which exist only once the model is built."""
    chosen: list[nn.Module] = []

    def build():
        model = program.build()
        chosen[:] = [model.model.layers[0], model.model.layers[1].mlp]
        return model

    if placement == "kept":
        plan = kept_plan(
            run_memopt(
                Program(build=build, step=program.step), "recompute", regions=chosen
            ).run.trace
        )
    else:
        plan = placement
    return run_memopt(Program(build=build, step=program.step), plan, regions=chosen)


def test_unknown_regions_are_refused():
    model = model_program("llama").build()
    with pytest.raises(ValueError, match=r"model\.layer"):
        memopt.start(model, regions=["model.layer"])
    with pytest.raises(ValueError, match="region"):
        memopt.start(model, regions=lambda name, module: False)
    with pytest.raises(ValueError, match="region"):
        memopt.start(model, regions=[nn.Linear(2, 2)])
    assert all("forward" not in vars(m) for m in model.modules())


def test_both_stacks_of_an_encoder_decoder_are_found():
    names = [region.name for region in trace_of(model_program("t5")).regions]
    assert [n for n in names if n.startswith("encoder")] and [
        n for n in names if n.startswith("decoder")
    ]


def test_a_flat_sequential_is_cut_at_about_equal_bytes():
    """Five convolution stages with the same output size each, no list anywhere."""

    def build():
        stages = [nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(8)]
        return nn.Sequential(*[layer for stage in stages for layer in stage])

    def step(model, i):
        loss = (
            model(torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(i)))
            .square()
            .mean()
        )
        loss.backward()
        return loss

    program = Program(build=build, step=step)
    regions = trace_of(program).regions
    assert len(regions) >= 2
    sizes = [region.saved_nbytes + region.input_nbytes for region in regions]
    assert max(sizes) <= 2 * min(sizes) + 2 * 2 * 4 * 256 * 4, sizes
    for placement in CPU_PLACEMENTS:
        assert_bitwise(program, placement)


# ---------------------------------------------------------------------------------------------------- plans and shapes
@pytest.mark.parametrize("placement", some("kept", "ssd", "mix-0"))
def test_batches_and_sequences_change_shape(placement):
    program = model_program("llama", dropout=True)

    def step(model, i):
        batch = ids(i, rows=1 + i % 3, tokens=(TOKENS, 7, 23, TOKENS)[i % 4])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss

    assert_bitwise(Program(build=program.build, step=step, num_steps=6), placement)


@pytest.mark.parametrize("placement", ["recompute", "kept", "ssd", "mix-0"])
def test_gradient_accumulation(placement):
    program = model_program("gpt2", dropout=True)

    def step(model, i):
        return [program.step(model, 3 * i + k) for k in range(3)]

    record = assert_bitwise(Program(build=program.build, step=step), placement)
    assert record.run.trace.num_micro_batches == 3


def test_auto_under_a_budget_is_exact_and_inside_it():
    """The planner's own choice, between what the plain step takes and what recomputing everything takes."""
    program = model_program("llama", dropout=True)
    trace = trace_of(program)
    saved = sum(region.saved_nbytes for region in trace.regions)
    budget = memopt.Budget(device=trace.peak_bytes + saved // 3)
    record = run_memopt(program, "auto", budget=budget)
    compare(plain_run(program), record)
    placed = {
        op.placement for region in record.run.plan.regions for op in region.ops if not region.plain
    }
    assert "device" in placed or any(region.plain for region in record.run.plan.regions)


def test_a_model_that_fits_is_left_alone_and_the_report_says_so():
    program = model_program("llama")
    record = run_memopt(program, "auto", budget=memopt.Budget(device="4GiB"))
    compare(plain_run(program), record)
    assert record.run.plan is None or all(region.plain for region in record.run.plan.regions)
    assert "fits" in notes_of(record.run)


def test_a_budget_that_nothing_meets_is_refused_with_the_smallest_that_works():
    program = model_program("llama")
    model = program.build().train()
    with (
        pytest.raises(memopt.BudgetError, match=r"\d") as caught,
        memopt.optimize(model, budget=memopt.Budget(device="16KiB")),
    ):
        program.step(model, 0)
    assert "smallest" in str(caught.value)
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_saved_plan_is_loaded_and_runs_the_same(tmp_path):
    program = model_program("llama", dropout=True)
    plan = plan_for(program, "mix-0")
    plan.save(tmp_path / "plan.json")
    for given in (
        memopt.Plan.load(tmp_path / "plan.json"),
        tmp_path / "plan.json",
        str(tmp_path / "plan.json"),
    ):
        record = run_memopt(program, given)
        compare(plain_run(program), record)
        assert record.run.plan.regions == plan.regions


def test_placements_that_cannot_be_are_refused():
    model = model_program("llama").build()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    if not torch.cuda.is_available():
        with pytest.raises(memopt.ConfigError, match="host"):
            memopt.start(model, plan="host")
    with pytest.raises(memopt.ConfigError, match="ssd"):
        memopt.start(model, plan="ssd")  # no directory was given
    with pytest.raises(ValueError, match="nvme"):
        memopt.start(model, plan="nvme")
    with pytest.raises(ValueError, match="engine"):
        memopt.start(model, engine="aio")
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
