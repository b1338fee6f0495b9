"""CFlow: the likelihood of each patch under a flow that is conditioned on its position."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.detectors.base import Detector
from flawsift.detectors.parts.flows import Flow, position_code
from flawsift.detectors.parts.maps import upsample
from flawsift.detectors.parts.scaling import whitening
from flawsift.detectors.parts.training import (
    UNWATCHED,
    Recipe,
    Watch,
    restored,
    seeded,
    train,
    warmup_cosine,
    weights_of,
)
from flawsift.errors import InputError
from flawsift.features.devices import resolve_device

# Of the authors' code; see the schedule in `CFlow`.
WARMUP = 0.08  # of the steps: the first 2 of 25 meta epochs
FLOOR = 1e-3  # of the learning rate, at the last step
RIDGE = 0.01  # of the whitening, in variances of a channel: PaDiM's epsilon


@dataclass(kw_only=True, eq=False)
class CFlow(Detector):
    """Likelihood of each patch under a normalizing flow per tap, conditioned on a code of the patch's place.

    A flow maps the C channels at one place to a standard normal; l = log p / C. It is trained to maximise
    log sigmoid(l). Each tap's l is brought onto a scale that is measured on the training set once, at the end of the
    training, so that no score depends on other test images. The map is the sum over taps, the image score its maximum.

    Cost: Per step and tap, `fibres` rows through `n_blocks` couplings with a hidden layer of C + 2 `position_dim`, then
        one pass over the set for the scale. With the embedded backbone at 256 px and one core, a fit takes about 20 s
        for 200 images and prediction 30 ms per image; the budget preset a third and a quarter of that. The state
        does not grow with the set. A rotation costs one more pass of all training images through the backbone.
    Contamination: Defects that are a fixed share of the fibres become likely themselves, and the flow has the capacity
        to give them a mode of their own; a fifth of defective images cost 0.03 to 0.12 of image AUROC on the two sets
        that were looked at. Few steps and whitening, which only has second moments, soften that.
    Differs from the paper: The scale of a tap's likelihood comes from the training set, not from a maximum over the
        test set. `scale` "log" adds (mean - l) / sd; the paper's 1 - exp(l - max) is 1 for everything unusual. The
        fixed mixing is a permutation, not a random rotation, whose C^2 entries per block cost as much as the subnet.
        Rotations are a few cached views, not random angles. A step takes the same random places of every image in its
        batch, and the same share of every grid. Training is counted in steps, not passes, so small sets get as many.
        The default whitens the fibres, reads two taps and takes far fewer steps at a higher rate. The image score is
        the maximum on the patch grid, before upsampling. Maps are smoothed like those of all detectors, and upsampled
        without aligned corners. On a GPU that has bfloat16, the forward pass of a step is in it, the authors' in
        float32.
    Schedule of the paper preset: from the authors' code are Adam at 2e-4, 25 meta epochs of 8 passes, a warm-up over
        the first two, and a cosine to a thousandth. Ours is that both move at every step, the warm-up from 0: there the
        cosine moves once per meta epoch, and the warm-up goes from a tenth of the rate to where the cosine then is.
        Ours, too, is that a step trains the flows of all taps: there every tap has steps of its own on 256 fibres,
        coarser ones fewer, and `steps` counts those of the finest.
    Reference: Gudovskiy et al., "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional
        Normalizing Flows", WACV 2022, arXiv 2107.12571, sections 4.1 to 4.3.

    Attributes:
        n_blocks: Couplings of each flow.
        position_dim: Length of the position code, a multiple of 4.
        steps: Gradient steps.
        batch_size: Images whose fibres a step sees.
        fibres: Fibres of the largest grid that a step sees; of other grids it takes the same share.
        learning_rate: Of Adam, after a linear warm-up and before a cosine decay.
        scale: How taps are added: "log" in standard deviations of the log likelihood, "likelihood" as likelihood
            missing to the training set's best patch, which is bounded and has ties.
        whiten: Whether the fibres of a tap are brought to mean 0 and covariance I first, over all places.
        rotations: Angles in degrees of the views that are trained on beside the images.
        whitening_: {layer: (1 + C, C)} a mean, and a matrix that the difference to it is multiplied with.
        scale_: (taps, 3) maximum, mean and standard deviation of l over the training set.
        weights_: Parameters and permutations of the flows.
    """

    name: ClassVar[str] = "cflow"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "budget": {"n_blocks": 4, "position_dim": 32, "steps": 300},
        # the published code: three taps, 200 passes over 242 images (MVTec AD's mean) at 256 px in
        # batches of 32, each of 128 steps on 256 fibres of the largest grid
        "paper": {
            "layers": ("stride8", "stride16", "stride32"),
            "n_blocks": 8,
            "position_dim": 128,
            "steps": 200 * (242 // 32) * 128,
            "batch_size": 32,
            "fibres": 256,
            "learning_rate": 2e-4,
            "scale": "likelihood",
            "whiten": False,
            "rotations": (-5.0, -2.5, 2.5, 5.0),
        },
    }

    n_blocks: int = 8
    position_dim: int = 128
    steps: int = 400
    batch_size: int = 16
    fibres: int = 512
    learning_rate: float = 1e-3
    scale: Literal["log", "likelihood"] = "log"
    whiten: bool = True
    rotations: Sequence[float] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rotations, list):  # JSON has lists only
            self.rotations = tuple(self.rotations)
        for parameter in ("n_blocks", "steps", "batch_size", "fibres"):
            self._require(parameter, getattr(self, parameter) >= 1, "be at least 1")
        code_fits = self.position_dim >= 4 and self.position_dim % 4 == 0
        self._require("position_dim", code_fits, "be a positive multiple of 4")
        self._require("learning_rate", self.learning_rate > 0, "be positive")
        self._require("scale", self.scale in ("log", "likelihood"), "be 'log' or 'likelihood'")
        listed = isinstance(self.rotations, tuple)
        angles = listed and all(type(angle) in (int, float) and math.isfinite(angle) for angle in self.rotations)
        self._require("rotations", angles, "be a list of angles in degrees")

    @property
    def views(self) -> tuple[str, ...]:
        """A derived view of the training images for each rotation."""
        return tuple(f"rotate:{angle:g}" for angle in self.rotations)

    def fit(self, data: ImageSet, *, device: str = "auto", watch: Watch = UNWATCHED) -> Self:
        """See `Detector.fit`."""
        self._forget()
        target = resolve_device(device)
        self.whitening_ = whitening(data, self.layers, RIDGE) if self.whiten else _unchanged(data, self.layers)
        flows = self._build().to(target)
        taps = [cast(Flow, flow) for flow in flows]
        views = ("", *self.views)

        def loss_of(batch: Batch, step: int) -> Tensor:
            view = views[int(torch.randint(len(views), ()))]
            seen = next(data.select(batch.ids).view(view).batches(self.layers, batch_size=len(batch)))
            pairs = zip(taps, self._fibres(seen, target, share=True), strict=True)
            # flows share nothing: each has the gradient of its own loss
            return torch.stack([-F.logsigmoid(flow.log_likelihood(*fibres)).mean() for flow, fibres in pairs]).sum()

        rate = warmup_cosine(int(WARMUP * self.steps), self.steps, FLOOR)
        recipe = Recipe(steps=self.steps, batch_size=self.batch_size, seed=self.seed, schedule=rate)
        optimizer = torch.optim.Adam(flows.parameters(), lr=self.learning_rate, fused=True)
        # batches come without features: `loss_of` reads those of the view that it draws
        train(flows, optimizer, data, (), loss_of, recipe, device=target, watch=watch)
        self.weights_ = weights_of(flows)
        self.scale_ = self._measure(data, target)
        return self

    def _measure(self, data: ImageSet, device: str) -> Tensor:
        """(taps, 3) maximum, mean and standard deviation of the training set's log likelihoods."""
        batches = [self._log_likelihoods(batch, device) for batch in data.batches(self.layers)]
        rows = []
        for parts in zip(*batches, strict=True):
            values = torch.cat([part.flatten() for part in parts]).double()
            mean, deviation = values.mean(), values.std(correction=0)
            # equal patches differ by the rounding of float32: dividing by that would magnify it
            flat = deviation <= 1e-6 * mean.abs().clamp_min(1)
            rows.append(torch.stack([values.max(), mean, torch.where(flat, torch.ones_like(deviation), deviation)]))
        return torch.stack(rows).float()

    def _maps(self, batch: Batch, device: str) -> Tensor:
        likelihoods = self._log_likelihoods(batch, device)
        grid = max(values.shape[1] for values in likelihoods)
        parts = []
        for values, (top, mean, deviation) in zip(likelihoods, self.scale_, strict=True):
            missing = (mean - values) / deviation if self.scale == "log" else 1 - (values - top).clamp_max(0).exp()
            parts.append(upsample(missing, grid))
        return torch.stack(parts).sum(0)

    def _expected(self, batch: Batch, device: str) -> Tensor:
        """The patch that is as likely as a usual one: latents are drawn in to the radius sqrt(C), where most lie."""
        parts = []
        for layer, flow, (x, code) in zip(self.layers, self._flows(device), self._fibres(batch, device), strict=True):
            z, _ = flow(x, code)
            radius = math.sqrt(z.shape[-1])
            x = flow.inverse(z * (radius / z.norm(dim=-1, keepdim=True).clamp_min(radius)), code).cpu()
            mean, matrix = self.whitening_[layer][0], self.whitening_[layer][1:]
            # one system for all rows: a batch of them would factorise the matrix once per image
            features = torch.linalg.solve(matrix, x.flatten(0, 1), left=False) + mean  # as the backbone has them
            parts.append(features.view_as(x).transpose(1, 2).reshape(batch.features[layer].shape))
        grid = max(part.shape[2] for part in parts)
        return torch.cat([torch.stack([upsample(image, grid) for image in part]) for part in parts], 1)

    def _log_likelihoods(self, batch: Batch, device: str) -> list[Tensor]:
        """(B, h, w) of each tap."""
        likelihoods = []
        with torch.inference_mode():
            for layer, flow, (x, code) in zip(
                self.layers, self._flows(device), self._fibres(batch, device), strict=True
            ):
                values = flow.log_likelihood(x, code).cpu()
                likelihoods.append(values.view(len(batch), *batch.features[layer].shape[2:]))
        return likelihoods

    def _fibres(self, batch: Batch, device: str, *, share: bool = False) -> list[tuple[Tensor, Tensor]]:
        """(B, P, C) fibres of each tap and their (P, E) codes, of all places or of a random share of them."""
        cells = [batch.features[layer][0, 0].numel() for layer in self.layers]
        wanted = self.fibres / (len(batch) * max(cells)) if share else 1.0
        pairs = []
        for layer, n in zip(self.layers, cells, strict=True):
            tap = batch.features[layer]
            code, fibres = position_code(tap.shape[2], tap.shape[3], self.position_dim), tap.flatten(2)
            if share:
                places = torch.randperm(n)[: max(1, round(wanted * n))]
                fibres, code = fibres[:, :, places], code[places]
            whitened = (fibres.transpose(1, 2) - self.whitening_[layer][0]) @ self.whitening_[layer][1:]
            pairs.append((whitened.to(device), code.to(device)))
        return pairs

    def _build(self) -> nn.ModuleList:
        sizes = [self.whitening_[layer].shape[1] for layer in self.layers]
        with seeded(self.seed, "cpu"):
            return nn.ModuleList(Flow(channels, self.position_dim, self.n_blocks) for channels in sizes)

    def _flows(self, device: str) -> list[Flow]:
        """The flow of each tap on a device."""

        def make() -> list[Flow]:
            return [cast(Flow, flow) for flow in restored(self.weights_, self._build(), device)]

        return self._cached("net", device, make)


def _unchanged(data: ImageSet, layers: Sequence[str]) -> dict[str, Tensor]:
    """The `whitening` that leaves fibres as they are: mean 0 above the unit matrix."""
    if not len(data):
        raise InputError("CFlow.fit needs at least one image, got an empty set.")
    first = next(data.select(data.ids[:1]).batches(layers))
    sizes = {layer: tap.shape[1] for layer, tap in first.features.items()}
    return {layer: torch.cat([torch.zeros(1, size), torch.eye(size)]) for layer, size in sizes.items()}
