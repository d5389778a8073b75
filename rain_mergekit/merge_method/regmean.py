"""`merge_method: regmean`: RegMean of a reasoning and an instruct model (2212.09849).

W = W_R + λ Δ G_I (G_I + s G_R)⁻¹ with the second moments G of each set's features: rain's kernel
with graded factors, which the calibration file holds. Δ = W_I - W_R is RegMean itself; with a
`role: pretrained` model Δ = W_I - W_B, anchored at the reasoning model.
"""

from __future__ import annotations

from rain_mergekit.config.method_names import REGMEAN
from rain_mergekit.merge_method.rain import RainMerge
from rain_mergekit.merge_method.spec import Card

METHOD = RainMerge(Card(REGMEAN, "RegMean", "https://arxiv.org/abs/2212.09849"))
