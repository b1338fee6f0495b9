"""One training loop for every detector that learns by gradient steps.

A step's batch and its random numbers follow from (seed, step) alone, so a resumed run equals an uninterrupted one, and
training leaves torch's and numpy's global generators as they were.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from flawsift.data.images import Batch, ImageSet
from flawsift.errors import InputError, TrainingError
from flawsift.progress import Progress, silent
from flawsift.types import Ids
from flawsift.unfinished import read_unfinished, write_unfinished

SAVE_SECONDS = 30.0  # between checkpoints: the most that a kill can cost
_TOLD = "told"  # the tensor of a checkpoint that has its step and what it is of
_SEPARATOR = "/"  # between the parts of a checkpoint's tensor names
_BETAS = (0.9, 0.999)  # of StableAdamW: those of AdamW
_REMEDY = "Lower the learning rate."


@dataclass(frozen=True)
class Watch:
    """Who follows a long fit.

    Attributes:
        progress: Told about each step.
        checkpoint: A file for the state of an unfinished training; a later fit with the same images and settings goes
            on there. Losses cannot be compared: trainings that differ in their loss need a file each.
    """

    progress: Progress = silent
    checkpoint: Path | None = None


UNWATCHED = Watch()
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Gradient steps.
        batch_size: Images in a batch; a smaller set is one batch, and an epoch's incomplete last batch is left out.
        seed: Of batch order, dropout and noise.
        clip_norm: Most that the global gradient norm may be; None leaves it.
        schedule: Factor on each group's learning rate at a step, from 0.
        large_products: Whether matrix products are large enough for mixed precision to pay on a CPU.
    """

    steps: int
    batch_size: int
    seed: int = 0
    clip_norm: float | None = None
    schedule: Callable[[int], float] | None = None
    large_products: bool = False

    def ids_at(self, ids: Ids, step: int) -> Ids:
        """The ids of a step's batch: each epoch is a permutation of its own."""
        size = min(self.batch_size, len(ids))
        epoch, turn = divmod(step, len(ids) // size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(ids))
        chosen: Ids = ids[order[turn * size : (turn + 1) * size]]
        return chosen


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    layers: Sequence[str],
    loss_of: Callable[[Batch, int], Tensor],
    recipe: Recipe,
    *,
    device: str,
    watch: Watch = UNWATCHED,
) -> None:
    """Take gradient steps on `module` in place.

    Args:
        module: On `device`, in training mode (its own affair: frozen parts stay in eval mode).
        optimizer: Over its parameters.
        data: N >= 1 images with features attached.
        layers: Layers that `loss_of` reads.
        loss_of: The scalar loss of a batch (features on the CPU) at a step.
        recipe: Steps, batch size, clipping, schedule, seed.
        device: A resolved torch device.
        watch: Progress and checkpoint.

    Raises:
        InputError: The set is empty.
        TrainingError: The loss is not finite, or a parameter after the last step is not.
    """
    if not len(data):
        raise InputError("Training needs at least one image, got an empty set.")
    base = [group["lr"] for group in optimizer.param_groups]
    kind = device.partition(":")[0]
    mixed = _mixed(recipe, kind)
    settings = "" if watch.checkpoint is None else _signature(module, optimizer, data, layers, recipe, mixed)
    first = _resume(module, optimizer, watch.checkpoint, settings)
    saved_at = time.monotonic()
    with seeded(recipe.seed, device):
        for step in range(first, recipe.steps):
            _seed(_mix(recipe.seed, step), device)
            if recipe.schedule is not None:
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * recipe.schedule(step)
            chosen = data.select(recipe.ids_at(data.ids, step))
            batch = next(chosen.batches(layers, batch_size=len(chosen)))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = loss_of(batch, step)
            if not bool(loss.detach().isfinite()):
                raise TrainingError(f"The loss became {float(loss.detach())} at step {step}. {_REMEDY}")
            _descend(loss, module, optimizer, recipe.clip_norm)
            watch.progress("training", step + 1, recipe.steps)
            unfinished = step + 1 < recipe.steps
            if unfinished and watch.checkpoint is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                _save(module, optimizer, watch.checkpoint, step + 1, settings)
                saved_at = time.monotonic()
    # a gradient may overflow where the loss did not, and after the last step no loss would tell
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise TrainingError(f"A parameter is not finite after the last step. {_REMEDY}")
    if watch.checkpoint is not None:
        watch.checkpoint.unlink(missing_ok=True)


def _descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    optimizer.step()


def _mixed(recipe: Recipe, kind: str) -> bool:
    """Whether the forward pass is in mixed precision: on a GPU that has bfloat16, on a CPU as `large_products` says."""
    if kind == "cpu":
        return recipe.large_products and cpu_multiplies_bfloat16()
    return kind == "cuda" and torch.cuda.is_bf16_supported()


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has matrix instructions for bfloat16 (AMX); an older torch cannot tell and says no."""
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


@contextlib.contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Torch's global generators seeded inside, and as they were outside: initialisation and dropout take no other."""
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        _seed(seed, device)
        yield


def _seed(seed: int, device: str) -> None:
    """Seed what a device draws from, and nothing else: `torch.manual_seed` also seeds GPUs that nobody restores."""
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def warmup_cosine(warmup: int, total: int, floor: float) -> Callable[[int], float]:
    """A schedule: linear from 0 over `warmup` steps, then a cosine from 1 to `floor` at the last of `total` steps."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        turn = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        return float(floor + (1 - floor) * (1 + np.cos(np.pi * turn)) / 2)

    return factor


class StableAdamW(torch.optim.Optimizer):
    """AdamW with AMSGrad whose step shrinks, parameter tensor by tensor, when gradients outgrow their history.

    With u = g / (sqrt(v_max) / sqrt(1 - beta2^t) + eps), a tensor's step is divided by max(1, RMS(u)). Weight decay
    acts on every parameter.

    Reference: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS
    2023, arXiv 2304.13013, Algorithm 2; with the AMSGrad of Reddi et al., ICLR 2018.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step on all parameters that have a gradient."""
        beta1, beta2 = _BETAS
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                g, state = parameter.grad, self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # a tensor, since checkpoints hold tensors
                    state |= {name: torch.zeros_like(parameter) for name in ("mean", "square", "largest")}
                state["step"] += 1
                t = float(state["step"])
                mean, square, largest = state["mean"], state["square"], state["largest"]
                mean.lerp_(g, 1 - beta1)
                square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                torch.maximum(largest, square, out=largest)
                scale = (largest / (1 - beta2**t)).sqrt_().add_(group["eps"])
                rms = (g / scale).square_().mean().sqrt_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # a tensor all along: reading the RMS as a number would wait for a GPU once per parameter
                parameter.sub_(mean / scale * (group["lr"] / (1 - beta1**t) / rms.clamp_min(1)))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, as a detector's learned state keeps them."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def restored(weights: Mapping[str, Tensor], module: M, device: str) -> M:
    """A module with these weights, in eval mode, on a device, without gradients.

    Build the module under `torch.device("meta")`: its own weights are not drawn, so no generator is touched.
    """
    module.load_state_dict(weights, assign=True)
    return module.to(device).eval().requires_grad_(False)


def without_rejected(maps: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """(B, C, h, w) maps with rejected patches set to zero: no loss and no gradient where both sides are zero."""
    masked = []
    for each in maps:
        accepted = batch.accepted(*each.shape[2:])
        masked.append(each if accepted is None else each * accepted[:, None].to(each))
    return masked


def _mix(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _signature(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    layers: Sequence[str],
    recipe: Recipe,
    mixed: bool,
) -> str:
    """SHA-256 of all that decides a training but its loss, before its first step."""
    shapes = [f"{name}{tuple(value.shape)}" for name, value in module.state_dict().items()]
    groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    rates = [recipe.schedule(step) for step in range(recipe.steps)] if recipe.schedule else []
    rule = [
        recipe.steps,
        recipe.batch_size,
        recipe.seed,
        recipe.clip_norm,
        rates,
        type(optimizer).__name__,
        groups,
        mixed,
    ]
    rejected = {i: (mask.shape, np.packbits(mask).tobytes()) for i, mask in data.rejected.items()}
    features = data.reader.key if data.reader is not None else ""
    region = None if data.region is None else data.region.as_json()
    seen = [data.ids.tolist(), data.names, data.seen_as, features, list(layers), sorted(rejected.items()), region]
    return hashlib.sha256(repr([shapes, rule, seen]).encode("utf-8", "backslashreplace")).hexdigest()


def _save(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, step: int, settings: str) -> None:
    tensors = {f"module{_SEPARATOR}{name}": value for name, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer{_SEPARATOR}{index}{_SEPARATOR}{k}": torch.as_tensor(v) for k, v in state.items()}
    told = torch.tensor([step, *bytes.fromhex(settings)])
    write_unfinished(path, {_TOLD: told, **{k: v.detach().cpu() for k, v in tensors.items()}})


def _resume(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None, settings: str) -> int:
    """The first step to take: 0, or where a checkpoint of the same training stands, which is then restored."""
    tensors = None if path is None else read_unfinished(path)  # a torn one costs its steps, nothing else
    if tensors is None:
        return 0
    step, *of = tensors[_TOLD].tolist()
    if bytes(of).hex() != settings:
        return 0
    prefix = f"module{_SEPARATOR}"
    module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(f"optimizer{_SEPARATOR}"):
            _, index, key = name.split(_SEPARATOR)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(step)
