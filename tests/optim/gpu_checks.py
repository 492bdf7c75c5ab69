"""Checks of the native step on a GPU, as plain functions: tests and the benchmark run them."""

from __future__ import annotations

import math

import torch

from memopt.ops import frugal_step as op
from memopt.ops.counter_rng import key_of
from memopt.ops.frugal_draw import Lines, draw_of
from memopt.optim import Frugal

SHAPES = [
    (96, 256),
    (33, 20),
    (256, 512),
    (30,),
    (4, 3, 5),
    (70, 300),
    (3000, 64),
    (1,),
    (512, 256),
    (700, 3),
    (5, 9000),
    (2, 40000),
]


def make_params(dtype, shapes=SHAPES, seed=0, device="cuda"):
    generator = torch.Generator(device=device).manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, device=device).to(dtype))
        for s in shapes
    ]


def give_grads(params, generator, scale=1.0):
    for p in params:
        grad = torch.randn(p.shape, generator=generator, device=p.device) * scale
        p.grad = grad.to(p.dtype)


def against_reference(dtype=torch.float32, steps=8, **settings):
    """Return the largest |native - reference| / max|w| of one update over three switches."""
    sides = []
    for impl in ("native", "reference"):
        params = make_params(dtype)
        chosen = {"density": 0.3, **settings}
        sides.append((params, Frugal(params, lr=1e-2, weight_decay=0.1, update_gap=3, impl=impl,
                                     **chosen)))  # fmt: skip
    generator = torch.Generator(device="cuda").manual_seed(5)
    worst, different, total = 0.0, 0, 0
    for _ in range(steps):
        give_grads(sides[0][0], generator)
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            b.grad = a.grad.clone()
            b.data.copy_(a.data)
        for _, optimizer in sides:
            optimizer.step()
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            difference = (a.detach().double() - b.detach().double()).abs()
            worst = max(worst, float(difference.max() / b.detach().abs().max()))
            different += int((difference > 0).sum())
            total += a.numel()
    return worst, different / total


def _exact_adamw(w, g, m, v, step, lr, wd, betas, eps):
    w, g, m, v = (x.double() for x in (w, g, m, v))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    denom = (v / (1 - betas[1] ** step)).sqrt() + eps
    return w * (1 - lr * wd) - lr * (m / (1 - betas[0] ** step)) / denom


def _state_of(optimizer, p):
    """Return (mask, m, v, updates so far) of a parameter in the open call, moments in its shape."""
    bucket, i = optimizer._groups[0].home[p]
    part, offset = bucket.parts[i], bucket.offsets[i]
    entry = bucket.entries[i]
    mask = part.mask(entry.rows, entry.columns).view(p.shape).to(p.device)
    moments = []
    for moment in bucket.arena.load(offset, offset + part.num_slots, p.dtype):
        full = torch.zeros_like(p)
        full[mask] = moment  # slots are in the order of the elements
        moments.append(full.detach())
    return mask, *moments, optimizer.state[p]["step"]


def errors_against_float64(
    dtype, steps=30, device="cuda", shapes=((1024, 1024), (1000, 333)), **settings
):
    """Return (ours, torch fused): summed and largest error of one update against float64.

    Of the elements that AdamW updates, over switches; from the same weights and moments for both.
    """
    lr, wd, betas, eps = 1e-3, 0.1, (0.9, 0.999), 1e-8
    ours = make_params(dtype, shapes, device=device)
    theirs = make_params(dtype, shapes, device=device)
    frugal = Frugal([{"params": ours, "density": 0.5, **settings}], lr=lr, weight_decay=wd, impl="native",
                    update_gap=max(2, steps // 3))  # fmt: skip
    fused = torch.optim.AdamW(theirs, lr=lr, weight_decay=wd, fused=True)
    generator = torch.Generator(device=device).manual_seed(1)
    sums, largest = [0.0, 0.0], [0.0, 0.0]
    for step in range(steps):
        give_grads(ours, generator, scale=0.02)
        if step == 0:
            for b in theirs:
                b.grad = torch.zeros_like(b)
            fused.step()  # makes its state
        frugal._group_state(frugal.param_groups[0], ours).begin_call()
        exact, masks = [], []
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
            b.data.copy_(a.data)
            mask, m, v, updates = _state_of(frugal, a)
            fused.state[b]["exp_avg"].copy_(m)
            fused.state[b]["exp_avg_sq"].copy_(v)
            fused.state[b]["step"].fill_(updates)
            masks.append(mask)
            exact.append(_exact_adamw(a.detach(), a.grad, m, v, updates + 1, lr, wd, betas, eps))
        frugal.step()
        fused.step()
        for number, params in enumerate((ours, theirs)):
            for p, truth, mask in zip(params, exact, masks, strict=True):
                error = (p.detach().double() - truth).abs()[mask]
                if error.numel():
                    sums[number] += float(error.sum())
                    largest[number] = max(largest[number], float(error.max()))
    assert sums[1] > 0
    return (sums[0], largest[0]), (sums[1], largest[1])


def replayed_equals_eager(selection="blocks", steps=9, **settings):
    """Whether a captured step, replayed over three switches and a schedule, gives the eager bits."""
    sides = []
    for capturable in (False, True):
        params = make_params(torch.float32)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = Frugal(params, lr=1e-2, selection=selection, update_gap=3, density=0.3,
                           weight_decay=0.1, capturable=capturable, impl="native", **settings)  # fmt: skip
        sides.append((params, optimizer))
    generator = torch.Generator(device="cuda").manual_seed(3)
    graph = None
    for step in range(steps):
        grads = [torch.randn(p.shape, generator=generator, device="cuda") for p in sides[0][0]]
        for params, optimizer in sides:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - 0.05 * step)
            for p, grad in zip(params, grads, strict=True):
                p.grad.copy_(grad)
        sides[0][1].step()
        params, optimizer = sides[1]
        if step == 0:
            optimizer.step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        else:
            optimizer.begin_step()
            graph.replay()
        torch.cuda.synchronize()
    return max(
        float((a.detach() - b.detach()).abs().max())
        for a, b in zip(sides[0][0], sides[1][0], strict=True)
    )


def surroundings(selection):
    """Return the largest difference that deterministic mode, autocast and CPU neighbours make."""
    sides = []
    for mixed in (True, False):
        params = make_params(torch.float32)
        host = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params[:3]]
        members = [*params, *host] if mixed else params
        named = [(str(i), p) for i, p in enumerate(members)]
        sides.append((members, Frugal(named, lr=1e-2, update_gap=3, selection=selection,
                                      density=0.3, on_switch="project")))  # fmt: skip
    generator = torch.Generator(device="cuda").manual_seed(5)
    for _ in range(8):
        give_grads(sides[1][0], generator)
        for a, b in zip(sides[0][0], sides[1][0], strict=False):
            a.grad = b.grad.clone()
        for a in sides[0][0][len(sides[1][0]) :]:
            a.grad = torch.ones_like(a)
        # cuBLAS has its own word on determinism (CUBLAS_WORKSPACE_CONFIG), so not for projections.
        torch.use_deterministic_algorithms(selection not in ("svd", "random"))
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                sides[0][1].step()
        finally:
            torch.use_deterministic_algorithms(False)
        sides[1][1].step()
    assert all(bool(p.isfinite().all()) for p in sides[0][0])
    return max(
        float((a.detach() - b.detach()).abs().max())
        for a, b in zip(sides[0][0], sides[1][0], strict=False)
    )


# (size, count): a word, its edges, the block's edges, Llama's widths, its vocabulary, beyond it.
DRAWS = [
    (2, 1), (31, 30), (32, 31), (33, 1), (1023, 512), (1024, 1), (1025, 1024), (2048, 512), (8192, 2048),
    (28672, 7168), (128_256, 32_064), (128_256, 128_255), (1_000_003, 250_000), (3_000_000, 2_999_999),
]  # fmt: skip


def draws_equal_reference():
    """Return how many draws of the kernel differ from the sorted ones, and from its own next run."""
    flat, pieces, position = [], [], 0
    for number, (size, count) in enumerate([*DRAWS, *((3000, 750),) * 300]):
        for lines in Lines:
            key = key_of("a draw", number, lines.name)
            flat += draw_of(key, size, count, lines, position)
            words = size if lines == Lines.ROWS else 2 * -(-size // 32) + count
            pieces.append((position, position + words))
            position += words + words % 2 + 2
    results = []
    for device in ("cuda", "cuda", "cpu"):
        index = torch.full((position,), -7, dtype=torch.int32, device=device)
        torch.ops.memopt.frugal_draw(index, flat)
        results.append(index.cpu())
    ours, again, theirs = results
    wrong = sum(not torch.equal(ours[a:b], theirs[a:b]) for a, b in pieces)
    wrong += not torch.equal(ours, theirs)  # nothing else is written
    return wrong + (not torch.equal(ours, again))


def broken_gradients(value, device="cuda", **settings):
    """Return for how many weights native and reference steps differ in being finite, and how many are not.

    One gradient of each parameter is NaN or infinite, once; two good steps follow.
    """
    sides, generator = [], torch.Generator(device=device).manual_seed(7)
    shapes = [(64, 256), (33, 256), (30,), (5, 9000)]
    if settings.get("selection") == "rows":  # 8-bit blocks must not cross them
        shapes = [(64, 256), (33, 256), (9, 512), (8, 9216)]
    for impl in ("native", "reference"):
        params = make_params(torch.float32, shapes, device=device)
        optimizer = Frugal(params, lr=1e-2, impl=impl, density=0.5, **settings)
        sides.append((params, optimizer))
    for step in range(3):
        give_grads(sides[0][0], generator)
        for a, b in zip(sides[0][0], sides[1][0], strict=True):
            if step == 0:
                a.grad.view(-1)[a.numel() // 3] = value
            b.grad = a.grad.clone()
        for _, optimizer in sides:
            optimizer.step()
    finite = [torch.cat([p.detach().isfinite().view(-1) for p in params]) for params, _ in sides]
    return int((finite[0] != finite[1]).sum()), int((~finite[1]).sum())


def memory_of_steps(dtype=torch.bfloat16, **settings):
    """Return (state bytes, bytes allocated by later steps, peak over weights + gradients + state)."""
    params = make_params(dtype, [(4096, 4096)] * 6)
    optimizer = Frugal(params, update_gap=2, impl="native", **settings)
    generator = torch.Generator(device="cuda").manual_seed(0)
    give_grads(params, generator)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        optimizer.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return optimizer.state_bytes(), torch.cuda.memory_allocated() - before, peak


def run_all():
    """Run every check; return {name: result} and a list of failures."""
    op.register()
    results, failures = {}, []

    def record(name, value, passed):
        results[name] = value
        if not passed:
            failures.append(name)

    for selection in ("blocks", "columns", "rows", "coordinates", "randperm"):
        for full, free in (("adamw", "sign"), ("lion", "sgd"), ("sgdm", "none")):
            for on_switch in ("reset", "project"):
                worst, _ = against_reference(
                    selection=selection, state_full=full, state_free=free, on_switch=on_switch
                )
                record(f"{selection}/{full}/{free}/{on_switch}", worst, worst <= 1e-6)
        for density in (0.03, 0.9):
            worst, _ = against_reference(selection=selection, density=density, maximize=True)
            record(f"{selection}/density {density}", worst, worst <= 1e-6)
        for rounding in ("stochastic", "kahan"):
            worst, share = against_reference(torch.bfloat16, selection=selection, rounding=rounding)
            record(f"{selection}/bf16/{rounding}", [worst, share], worst <= 2**-7 and share < 0.01)
    for rounding in ("nearest", "stochastic"):
        worst, _ = against_reference(quantize="8bit", rounding=rounding)
        record(f"blocks/8bit/{rounding}", worst, worst <= 5e-3)
    for value in (math.nan, math.inf, -math.inf):
        for rounding in ("nearest", "stochastic"):
            for full in ("adamw", "lion", "sgdm"):
                differ, broken = broken_gradients(
                    value, quantize="8bit", rounding=rounding, state_full=full, selection="rows"
                )
                # One weight of each parameter at least; more where a block of moments broke.
                record(f"8bit/{rounding}/{full}/gradient {value}", [differ, broken],
                       differ == 0 and (broken >= 4 or not math.isnan(value)))  # fmt: skip
    worst, _ = against_reference(torch.float16, rounding="kahan")
    record("blocks/fp16/kahan", worst, worst <= 2**-9)
    worst, _ = against_reference(maximize=True)
    record("blocks/maximize", worst, worst <= 1e-6)
    everything = [{"split": False}]
    everything += [{"selection": name} for name in ("blocks", "columns", "rows", "coordinates")]
    for dtype in (torch.float32, torch.bfloat16):
        for settings in everything:
            ours, fused = errors_against_float64(dtype, **settings)
            fine = ours[0] <= fused[0] * 1.001 and ours[1] <= fused[1] * 1.001
            record(f"error against float64, {dtype}, {settings}: ours, torch fused",
                   [ours, fused], fine)  # fmt: skip
    wrong = draws_equal_reference()
    record("draws of columns and rows that differ", wrong, wrong == 0)
    for selection in ("blocks", "columns", "rows", "coordinates"):
        worst = replayed_equals_eager(selection)
        record(f"cuda graph/{selection}", worst, worst <= 1e-6)
    for selection in ("blocks", "columns", "rows", "coordinates", "svd", "random"):
        worst = surroundings(selection)
        record(f"deterministic, autocast, two devices/{selection}", worst, worst <= 1e-6)
    state, grown, peak = memory_of_steps()
    budget = 6 * 4096 * 4096 * 2
    record(
        "memory/blocks", [state, grown, peak], grown <= 0 and peak <= 0.01 * (2 * budget + state)
    )
    return results, failures
