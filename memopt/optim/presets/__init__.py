"""Published methods in one line each, so that they can be compared on one code base.

Each returns a `Frugal` with settings that its paper's equations ask for; the file says which
equations, and where ours differ.
"""

from __future__ import annotations

from memopt.optim.presets.adafrugal import AdaFrugalSchedule, adafrugal
from memopt.optim.presets.apollo import apollo
from memopt.optim.presets.badam import badam
from memopt.optim.presets.fira import fira
from memopt.optim.presets.galore import galore
from memopt.optim.presets.scale import scale
from memopt.optim.presets.sinkgd import sinkgd

__all__ = [
    "AdaFrugalSchedule",
    "adafrugal",
    "apollo",
    "badam",
    "fira",
    "galore",
    "scale",
    "sinkgd",
]
