"""Linear segmentation and linear depth of held-out pictures, at the resolution that their maps are stored at.

    seg     mean over the classes of intersection / union, over all pixels of all pictures
    depth   RMSE and AbsRel over all pixels with a depth from ``NEAREST`` to ``FARTHEST``, and d1, the share of them
            with max(found / right, right / found) < 1.25

Published layer of depth: 256 bins from 0.001 to 10 m, weighted by their outputs, which are made positive and sum
up to 1; loss of Eigen et al. 2014, log difference with 0.15 of its squared mean.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from distill.protocols.linear_maps import OnBatch, Published, fit_published, fit_quick, samples
from distill.protocols.map_set import FARTHEST, IGNORED, NEAREST, MapSet, PatchNetwork
from distill.protocols.score import Protocol, Score, bootstrap_sums, interval_of

BINS = 256
NEAR = 1.25
EIGEN_HW, EIGEN = (480, 640), (slice(45, 471), slice(41, 601))  # of NYUv2: what is scored there
SEG = Published(40_000, 1500, 1e-3, 1e-3, (0.9, 0.999), (512, 512), scales=(0.5, 2.0), slide=341)
DEPTH = Published(
    38_400, 12_800, 3e-4, 1e-4, (0.9, 0.99), (416, 544), 35.0, brightness=(0.75, 1.25), degrees=2.5
)


class SegTarget:
    """Classes by cross-entropy, and intersection over union by torchmetrics."""

    nothing = IGNORED

    def __init__(self, classes: int, published: Published = SEG) -> None:
        from torchmetrics.classification import MulticlassJaccardIndex

        self.outputs, self.published = classes, published
        self._metric = MulticlassJaccardIndex(classes, ignore_index=IGNORED)

    def sums(self, values: Tensor, patch: Tensor, patches: int) -> tuple[Tensor, Tensor]:
        """Pixels of every class, and all that are not ignored."""
        good = values != IGNORED
        index = patch[good] * self.outputs + values[good].long()
        counts = torch.bincount(index, minlength=patches * self.outputs)
        found = counts.double().unflatten(0, (patches, self.outputs))
        return found, found.sum(1)

    def at_patches(self, outputs: Tensor) -> Tensor:
        """Returns logits as they are."""
        return outputs

    def loss(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Mean over the pixels that are not ignored."""
        total = F.cross_entropy(outputs, values.long(), ignore_index=IGNORED, reduction="sum")
        return total / (values != IGNORED).sum().clamp_min(1)

    def measure(self, outputs: Float[Tensor, "outputs height width"], values: Tensor) -> Tensor:
        """Intersection and union of every class in one picture."""
        found = outputs.argmax(0)
        self._metric.update(found[None], values[None].long())
        good = values != IGNORED
        found, right = found[good], values[good].long()
        both, one, other = (
            torch.bincount(each, minlength=self.outputs)
            for each in (right[found == right], found, right)
        )
        return torch.cat([both, one + other - both]).double()

    def score(
        self, rows: Float64[Tensor, "images figures"]
    ) -> tuple[float, Tensor, dict[str, float]]:
        """Mean IoU, that of resamples, and further figures."""

        def mean_iou(sums: Tensor) -> Tensor:
            both, union = sums.unflatten(1, (2, self.outputs)).unbind(1)
            return (both / union).nanmean(1)  # 0 / 0 where a class is nowhere

        return float(self._metric.compute()), bootstrap_sums(rows, mean_iou), {}


class DepthTarget:
    """Metres; RMSE and AbsRel by torchmetrics."""

    nothing, outputs = 0, BINS

    def __init__(self, published: Published = DEPTH) -> None:
        from torchmetrics import MeanAbsolutePercentageError, MeanSquaredError

        self.published = published
        self._rmse = MeanSquaredError(squared=False).set_dtype(torch.float64)
        self._relative = MeanAbsolutePercentageError().set_dtype(torch.float64)

    def sums(self, values: Tensor, patch: Tensor, patches: int) -> tuple[Tensor, Tensor]:
        """Metres, and pixels whose depth is scored."""
        good = _is_scored(values)
        metres = torch.bincount(patch[good], values[good].double(), patches)
        return metres[:, None], torch.bincount(patch[good], minlength=patches).double()

    def at_patches(self, outputs: Tensor) -> Tensor:
        """Metres of the bins, weighted."""
        shares = outputs.relu() + 0.1
        metres = torch.linspace(NEAREST, FARTHEST, BINS, device=outputs.device)
        return torch.einsum("nbhw,b->nhw", shares, metres)[:, None] / shares.sum(1, keepdim=True)

    def loss(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Root of the variance of the log difference and 0.15 of its squared mean."""
        good = _is_scored(values)
        if not good.any():
            return 0.0 * outputs.sum()
        error = outputs[:, 0][good].log() - values[good].log()
        return (error.var(correction=0) + 0.15 * error.mean() ** 2 + 1e-12).sqrt()

    def measure(self, outputs: Float[Tensor, "outputs height width"], values: Tensor) -> Tensor:
        """Sums over the pixels of one picture: squared error, near ones, and all."""
        found = outputs[0].clamp(NEAREST, FARTHEST).double()
        if tuple(values.shape) == EIGEN_HW:
            found, values = found[EIGEN], values[EIGEN]
        good = _is_scored(values)
        found, right = found[good], values[good].double()
        if len(right):
            self._rmse.update(found, right)
            self._relative.update(found, right)
        near = torch.maximum(found / right, right / found) < NEAR
        return torch.stack([((found - right) ** 2).sum(), near.double().sum(), good.double().sum()])

    def score(
        self, rows: Float64[Tensor, "images figures"]
    ) -> tuple[float, Tensor, dict[str, float]]:
        """RMSE in metres, that of resamples, and further figures."""
        near = float(rows[:, 1].sum() / rows[:, 2].sum())
        figures = {"AbsRel": float(self._relative.compute()), "d1": near}
        scores = bootstrap_sums(rows, lambda sums: (sums[:, 0] / sums[:, 2]).nan_to_num(0.0).sqrt())
        return float(self._rmse.compute()), scores, figures


def _is_scored(values: Tensor) -> Tensor:
    return (values >= NEAREST) & (values <= FARTHEST)


def score_maps(
    network: PatchNetwork,
    maps: MapSet,
    target: SegTarget | DepthTarget,
    protocol: Protocol,
    on_batch: OnBatch,
) -> Score:
    """Learns the layer on the training pictures, and measures it on the held-out ones."""
    is_quick, rows = protocol == "quick", list[Tensor]()
    predict = (fit_quick if is_quick else fit_published)(network, maps, target, on_batch)
    for pixels, values in samples(maps, maps.test):
        rows.append(target.measure(predict(pixels), torch.from_numpy(values)))
        on_batch(1)
    value, resampled, figures = target.score(torch.stack(rows))
    how = target.published
    layer = {"layer": "ridge", "input": f"{network.preparation.size} px"}
    if not is_quick:
        crop = f"{how.crop_hw[0]} x {how.crop_hw[1]} px"
        layer = {
            "layer": "BN, 1x1 convolution",
            "input": f"crops of {crop}",
            "steps": f"{how.steps:,}",
        }
    settings = {**figures, **layer, **maps.settings, "features": "patches, final norm"}
    task = "seg" if isinstance(target, SegTarget) else "depth"
    return Score(task, protocol, value, interval_of(resampled), settings)
