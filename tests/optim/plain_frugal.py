"""FRUGAL written out in plain PyTorch: no tiles, no arena, full-size moments. Tests compare with it."""

from __future__ import annotations

import torch


def sign(x):
    return torch.where(x.isnan(), x, x.sign())


def state_full_delta(rule, g, m, v, t, lr, b1, b2, eps):
    """Return the update; m and v change in place."""
    if rule == "adamw":
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        return -lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    if rule == "lion":
        u = sign(b1 * m + (1 - b1) * g)
        m.mul_(b2).add_((1 - b2) * g)
        return -lr * u
    m.mul_(b1).add_(g)
    return -lr * m


def state_free_direction(rule, g):
    if rule == "sign":
        return sign(g)
    if rule == "sgd":
        return g
    if rule == "none":
        return torch.zeros_like(g)
    norm = g.norm() if g.dim() < 2 else g.norm(dim=1, keepdim=True)
    return g / norm.clamp_min(1e-8)


class Plain:
    """One parameter: `mask` for index selections, `basis` (rank, short side) for subspaces."""

    def __init__(self, cfg):
        self.cfg, self.m, self.v, self.t = cfg, None, None, 0

    def reset(self):
        self.m, self.v, self.t = None, None, 0

    def update(self, w, g, mask=None, basis=None):
        c = self.cfg
        self.t += 1
        w = w * (1 - c["lr"] * c["wd"])
        if basis is not None:
            g2 = g if g.shape[0] >= g.shape[1] else g.T
            low = g2 @ basis.T
            delta, self.free_grad = self._full(low) @ basis, g2 - low @ basis
            s = state_free_direction(c["free"], self.free_grad)
            s = s - (s @ basis.T) @ basis if c.get("exact", True) else s
            total = delta - c["lr"] * c["free_scale"] * s
            return w + (total if g.shape[0] >= g.shape[1] else total.T)
        delta = torch.where(mask, self._full(g), 0.0)
        free = state_free_direction(c["free"], torch.where(mask, 0.0, g))
        return w + delta - torch.where(mask, 0.0, c["lr"] * c["free_scale"] * free)

    def _full(self, g):
        c = self.cfg
        if self.m is None:
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
        return state_full_delta(
            c["full"], g, self.m, self.v, self.t, c["lr"] * c["full_scale"], *c["betas"], c["eps"]
        )
