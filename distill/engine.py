"""DeepSpeed for one trained network on one group: backward, agreed step, EMA, full state in and out.

Several engines live in one process, on groups that nest and overlap. DeepSpeed assumes that its
engine owns the world, so:

- ``as_world`` makes the engine's group the world while the engine works, for every DeepSpeed
collective and rank query;
- stage 0 is never used (its gradient reduction reads a module global that the last engine wins),
not even for a group of one;
- engines of one process are driven in the same order on every rank.

The EMA lives beside the Adam moments of each shard: 1/N of the memory and no communication to
update. Full tensors are read by one all-gather per parameter group from the flat shards; a
parameter's place in the flat buffer is where its storage points.

A non-finite gradient norm (already reduced over the group, so every rank agrees) makes DeepSpeed
skip the step. A loss or a weight that is not finite on one rank is made to spoil that rank's
gradients, so it is agreed on in the same way; a number times one is the same number.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Shards = list[dict[str, Tensor]]  # of every parameter group this rank's part of each kind of state
STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
BETAS = (0.9, 0.99)  # METHOD section 4


@dataclass(frozen=True)
class EngineSettings:
    """How one network is optimised. ``precision`` is "fp32" or "bf16" (fp32 master weights either way).

    A step's gradient is the sum of ``num_parts`` micro-batches', added up in fp32. In bf16 that takes
    stage 2: the other stages add up in bf16, where late micro-batches round away.
    """

    zero_stage: int
    precision: str
    gradient_clip: float
    images_per_rank: int
    num_parts: int = 1


@dataclass(frozen=True)
class StepRates:
    """Learning rate, its value for the prototypes (0 while frozen), weight decay and EMA momentum of one step."""

    lr: float
    lr_prototypes: float
    weight_decay: float
    ema_momentum: float


def prepare_deepspeed(device_type: str) -> None:
    """Imports DeepSpeed for ``device_type`` without compiling anything; call after ``init_process_group``."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # CPU start-up would build a shared-memory kernel with a compiler (55 s); gloo does not need it.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(),
        auto_mpi_discovery=False,
        dist_init_required=False,
        verbose=False,
    )


class Engine:
    """One trained network, its optimizer and its EMA, sharded over ``group``."""

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        self_group: dist.ProcessGroup,
        settings: EngineSettings,
    ) -> None:
        """Wraps ``module``; collective over ``group`` (every rank of it, no other)."""
        import deepspeed

        self.group, self._num_parts = group, settings.num_parts
        self._mpu = _GroupLayout(group, self_group)
        fused = next(module.parameters()).device.type == "cuda"
        optimizer = torch.optim.AdamW(_parameter_groups(module), lr=0.0, betas=BETAS, fused=fused)
        with as_world(self._mpu):
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=_config(settings),
                mpu=self._mpu,
                dist_init_required=False,
            )
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._shards: list[Tensor] = list(self._zero.single_partition_of_fp32_groups)
        self._states = [self._zero.optimizer.state[shard] for shard in self._shards]
        for shard, state in zip(self._shards, self._states, strict=True):
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(shard)
            state["exp_avg_sq"] = torch.zeros_like(shard)
            state["ema"] = shard.detach().clone()

    @property
    def module(self) -> nn.Module:
        """The wrapped network; its parameters are views of the engine's flat buffers."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        with as_world(self._mpu):
            return self._engine(*inputs)

    def backward_and_step(self, loss: Tensor, rates: StepRates) -> None:
        """One micro-batch's gradients; after the step's last one: averaged over the group, clipped and applied, then the EMA.

        The step is skipped, by all ranks together, if a gradient, a loss or a weight is not finite.
        """
        for param_group in self._zero.optimizer.param_groups:
            param_group["lr"] = rates.lr_prototypes if param_group["is_prototypes"] else rates.lr
            param_group["weight_decay"] = rates.weight_decay if param_group["is_decayed"] else 0.0
        skipped_before = self._engine.skipped_steps
        with as_world(self._mpu):
            self._engine.backward(
                self._witnessed(loss) * self._num_parts
            )  # DeepSpeed divides by it
            is_last = self._engine.is_gradient_accumulation_boundary()
            self._engine.step()
        if is_last and self._engine.skipped_steps == skipped_before:
            with torch.no_grad():
                for shard, state in zip(self._shards, self._states, strict=True):
                    state["ema"].lerp_(shard, 1.0 - rates.ema_momentum)

    def _witnessed(self, loss: Tensor) -> Tensor:
        """The loss; gradients of NaN where it or a weight of this rank's shards is not finite."""
        seen = torch.stack([loss.detach().float(), *(shard.sum() for shard in self._shards)])
        return loss * (1.0 + 0.0 * seen.detach().sum())

    @property
    def grad_norm(self) -> float | Tensor:
        """Global gradient norm before clipping of the last step; infinite when the step was skipped."""
        norm: float | Tensor | None = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far because a gradient was not finite."""
        skipped: int = self._engine.skipped_steps
        return skipped

    def full(self, kind: str) -> dict[str, Tensor]:
        """Whole tensors of one of ``STATE_KINDS`` by parameter name, fp32. Communication: one all-gather per parameter group."""
        tensors = {}
        for index, flat in enumerate(self._zero.bit16_groups_flat):
            shard = self._shards[index].detach() if kind == "weight" else self._states[index][kind]
            whole = _all_gather(shard, self.group)
            for parameter in self._zero.bit16_groups[index]:
                place = _place(parameter, flat)
                tensors[self._names[id(parameter)]] = whole[place].view(parameter.shape)
        return tensors

    @torch.no_grad()
    def copy_ema_to(self, target: nn.Module) -> None:
        """Writes the EMA into the parameters of ``target`` with the same names. Communication as ``full``."""
        parameters = dict(target.named_parameters())
        for name, average in self.full("ema").items():
            parameters[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, independent of the layout: ``kind/name`` and ``step``. Communication as ``full``, four times."""
        tensors = {
            f"{kind}/{name}": tensor
            for kind in STATE_KINDS
            for name, tensor in self.full(kind).items()
        }
        tensors["step"] = self._states[0]["step"].reshape(1).clone()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``, for any number of ranks. No communication."""
        group_rank = dist.get_rank(self.group)
        for index, flat in enumerate(self._zero.bit16_groups_flat):
            own = slice(
                group_rank * self._shards[index].numel(),
                (group_rank + 1) * self._shards[index].numel(),
            )
            for kind in STATE_KINDS:
                whole = torch.zeros(flat.numel(), dtype=torch.float32, device=flat.device)
                for parameter in self._zero.bit16_groups[index]:
                    name = self._names[id(parameter)]
                    whole[_place(parameter, flat)] = tensors[f"{kind}/{name}"].to(whole).flatten()
                target = self._shards[index] if kind == "weight" else self._states[index][kind]
                target.copy_(whole[own])
                if kind == "weight":
                    flat.copy_(whole)
            self._states[index]["step"].copy_(tensors["step"][0])

    def is_finite_here(self) -> Tensor:
        """Weights, moments and EMA of this rank's shards are finite, and so is the network it computes with."""
        tensors = [shard for each in self._own_shards() for shard in each.values()]
        tensors += list(self._zero.bit16_groups_flat)
        return torch.stack([tensor.sum().isfinite() for tensor in tensors]).all()

    def is_finite(self) -> bool:
        """The same of all ranks. Waits for the device; one all-reduce over the group."""
        finite = self.is_finite_here().float()
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self.group)
        return bool(finite)

    @torch.no_grad()
    def keep(self, into: Shards | None = None) -> Shards:
        """A copy of this rank's shards in host memory, 16 bytes per parameter over the group; ``into`` is overwritten. No communication."""
        own = self._own_shards()
        if into is None:
            return [{kind: shard.to("cpu", copy=True) for kind, shard in e.items()} for e in own]
        for kept, shards in zip(into, own, strict=True):
            for kind, shard in shards.items():
                kept[kind].copy_(shard)
        return into

    @torch.no_grad()
    def go_back(self, kept: Shards) -> None:
        """To the state that ``keep`` copied, on every rank of the group together. One all-gather per parameter group."""
        for index, (shards, flat) in enumerate(
            zip(self._own_shards(), self._zero.bit16_groups_flat, strict=True)
        ):
            for kind, shard in shards.items():
                shard.copy_(kept[index][kind])
            flat.copy_(_all_gather(shards["weight"], self.group))

    def _own_shards(self) -> Shards:
        return [
            {"weight": shard.detach(), **state}
            for shard, state in zip(self._shards, self._states, strict=True)
        ]


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in three groups: matrices, vectors (no weight decay), prototypes (own learning rate while frozen)."""
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_prototypes = ".prototypes." in name
        is_decayed = parameter.ndim > 1 and not name.endswith(("_token", "_tokens"))
        kinds.setdefault((is_prototypes, is_decayed), []).append(parameter)
    return [
        {"params": parameters, "is_prototypes": is_prototypes, "is_decayed": is_decayed}
        for (is_prototypes, is_decayed), parameters in kinds.items()
    ]


def _config(settings: EngineSettings) -> dict[str, Any]:
    adds_halves = settings.precision == "bf16" and settings.num_parts > 1
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, settings.images_per_rank),
        "gradient_accumulation_steps": settings.num_parts,
        "gradient_clipping": settings.gradient_clip,
        "zero_optimization": {
            "stage": 2 if adds_halves else settings.zero_stage,
            "overlap_comm": False,
        },
    }
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if adds_halves:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _place(parameter: Tensor, flat: Tensor) -> slice:
    """Where a parameter lies in the flat buffer of its group."""
    start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
    return slice(start, start + parameter.numel())


def _all_gather(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Equal shards of all ranks of the group, in rank order, as one tensor."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return shard.clone()
    whole = torch.empty(num_ranks * shard.numel(), dtype=shard.dtype, device=shard.device)
    gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # renamed in torch 2.13
    gather(whole, shard, group=group)
    return whole


class _GroupLayout:
    """What DeepSpeed asks of a model-parallel unit: data parallel over one group, nothing else split."""

    def __init__(self, group: dist.ProcessGroup, self_group: dist.ProcessGroup) -> None:
        self._group, self._self_group = group, self_group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._self_group

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_rank = get_pipeline_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size


_GROUP_ARGUMENT = {
    "all_reduce": 2,
    "inference_all_reduce": 2,
    "all_reduce_coalesced": 2,
    "all_gather_coalesced": 2,
}
_GROUPED = {
    *_GROUP_ARGUMENT,
    "barrier",
    "monitored_barrier",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
}
_GROUPED |= {"reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "all_to_all"}
_ROOTED = {
    "broadcast": "src",
    "broadcast_object_list": "src",
    "reduce": "dst",
    "gather": "dst",
    "scatter": "src",
}


class _GroupAsWorld:
    """DeepSpeed's communication backend with one group in place of the world.

    Collectives that name no group, or name the world, use the group; a root given as a rank of the
    small world is translated.
    """

    def __init__(self, backend: Any, group: dist.ProcessGroup) -> None:
        self._backend, self._group = backend, group

    def _or_own(self, group: Any) -> Any:
        return self._group if group is None or group is dist.group.WORLD else group

    def get_rank(self, group: Any = None) -> int:
        return dist.get_rank(self._or_own(group))

    def get_world_size(self, group: Any = None) -> int:
        return dist.get_world_size(self._or_own(group))

    def get_global_rank(self, group: Any, group_rank: int) -> int:
        return dist.get_global_rank(self._or_own(group), group_rank)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backend, name)
        if name not in _GROUPED and name not in _ROOTED:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            place = _GROUP_ARGUMENT.get(name)
            if place is not None and len(args) > place:
                args = (*args[:place], self._or_own(args[place]), *args[place + 1 :])
                return function(*args, **kwargs)
            is_world = kwargs.get("group") is None or kwargs["group"] is dist.group.WORLD
            kwargs["group"] = self._or_own(kwargs.get("group"))
            root = _ROOTED.get(name)
            if root is not None and is_world and kwargs.get(root) is not None:
                kwargs[root] = dist.get_global_rank(self._group, kwargs[root])
            return function(*args, **kwargs)

        return call


@contextmanager
def as_world(layout: _GroupLayout) -> Iterator[None]:
    """While inside, DeepSpeed in this process sees the layout's group as the whole world."""
    import deepspeed.comm.comm as comm
    import deepspeed.utils.groups as groups

    backend, mpu = comm.cdb, groups.mpu
    comm.cdb, groups.mpu = _GroupAsWorld(backend, layout.get_data_parallel_group()), layout
    try:
        yield
    finally:
        comm.cdb, groups.mpu = backend, mpu
