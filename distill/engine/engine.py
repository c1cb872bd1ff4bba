"""DeepSpeed for one trained network on one group: backward, agreed step, EMA, full state in and out.

Several engines live in one process, on groups that nest and overlap. DeepSpeed assumes that its
engine owns the world, so:

- while the engine works its group is the world (``Engine._as_world``), for every DeepSpeed collective
and rank query;
- stage 0 is never used (its gradient reduction reads a module global that the last engine wins),
not even for a group of one;
- stage 3 counts modules and parameters of the full process and compares the counts between ranks;
they start from a separate number for every network;
- stage 3's replacement of ``F.linear``, process-wide, is switched off: it corrupts other engines;
- engines of one process are driven in the same order on every rank.

The EMA lives beside the Adam moments of each shard (``distill.engine.layouts``): 1/N of the memory and no
communication to update.

A step whose gradient norm (reduced over the group, so every rank agrees) is not finite is skipped,
and the host does not wait to learn it: the norm goes to AdamW as a tensor, and its fused kernel
clips or leaves everything as it is, as it does for a loss scaler. DeepSpeed's norm and checks,
each of which asks the device, are switched off; stage 3 cannot do without them. A loss or a weight
that is not finite on one rank is made to spoil that rank's gradients, so it is agreed on in the same
way; a number times one is the same number.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.engine.added_up import AddedUp
from distill.engine.config import CLIPPED_AS, EngineSettings, deepspeed_config, parameter_groups
from distill.engine.deepspeed_private import count_from, require_private_names
from distill.engine.group_as_world import GroupAsWorld, GroupLayout
from distill.engine.layouts import shards_of
from teacher.peers import waiting_for_peers

StateSnapshot = list[
    dict[str, Tensor]
]  # of every parameter group this rank's part of each kind of state
STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
BETA1 = 0.9
CLIP_EPS = 1e-6  # as torch and DeepSpeed have it


@dataclass(frozen=True)
class StepRates:
    """Learning rate, its value for the prototypes (0 while frozen), weight decay and EMA momentum of one step; whether the backbone learns."""

    lr: float
    lr_prototypes: float
    weight_decay: float
    ema_momentum: float
    is_backbone_frozen: bool = False


# what DeepSpeed imports by the first step; the last one brings torch's compiler, 3 s
DEEPSPEED_MODULES = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")


def prepare_deepspeed(device_type: str) -> None:
    """Imports DeepSpeed for ``device_type`` without compiling anything; call after ``init_process_group``."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    require_private_names()
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
        import deepspeed.comm.comm as comm

        self.group, self._num_parts = group, settings.deepspeed_parts
        self._mpu = GroupLayout(group, self_group)
        device = next(module.parameters()).device
        self._world = GroupAsWorld(comm.cdb, group, device)
        self._adamw: Any = torch.optim.AdamW(
            parameter_groups(module, settings),
            lr=0.0,
            betas=(BETA1, settings.beta2),
            fused=True,
        )
        self._clip, self._judges = settings.gradient_clip, settings.zero_stage != 3
        self._divides = self._judges or settings.clip_by == "module"
        self._divisors: dict[str, Tensor] = {}
        self._adamw.register_step_pre_hook(self._take_divisor)
        with self._as_world():
            if settings.zero_stage == 3:
                count_from(settings.first_id)
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self._adamw,
                config=deepspeed_config(settings, sum(p.numel() for p in module.parameters())),
                mpu=self._mpu,
                dist_init_required=False,
            )
        self._added_up = (
            AddedUp(self._engine, self._zero, module.parameters(), settings.num_parts)
            if settings.num_parts > self._num_parts
            else None
        )
        self._shards = shards_of(self._zero, module, group)
        self._states = [self._zero.optimizer.state[shard] for shard in self._shards.weights]
        for shard, state in zip(self._shards.weights, self._states, strict=True):
            state["step"] = torch.zeros((), device=shard.device)
            state["exp_avg"] = torch.zeros_like(shard)
            state["exp_avg_sq"] = torch.zeros_like(shard)
            state["ema"] = shard.detach().clone()
        self.grad_norm = torch.full((), torch.nan, device=device)
        self.is_applied = torch.zeros((), dtype=torch.bool, device=device)

    @contextmanager
    def _as_world(self) -> Iterator[None]:
        """While inside, DeepSpeed in this process gets the engine's group as the world."""
        import deepspeed.comm.comm as comm
        import deepspeed.utils.groups as groups

        backend, mpu = comm.cdb, groups.mpu
        comm.cdb, groups.mpu = self._world, self._mpu
        try:
            yield
        finally:
            comm.cdb, groups.mpu = backend, mpu

    @property
    def module(self) -> nn.Module:
        """The wrapped network; its parameters are views of the engine's flat buffers."""
        module: nn.Module = self._engine.module
        return module

    @property
    def shards_weights(self) -> bool:
        """Each rank holds a part of every weight (ZeRO 3), and they are gathered for each use."""
        return not self._judges

    def forward(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        with self._as_world():
            return self._engine(*inputs)

    def backward_and_step(self, loss: Tensor, rates: StepRates) -> None:
        """One micro-batch's gradients; after the step's last one: averaged over the group, clipped and applied, then the EMA.

        The step is skipped, by all ranks together, if a gradient, a loss or a weight is not finite:
        ``is_applied``. ``grad_norm`` is the global norm before clipping; not finite when it was skipped.
        """
        for param_group in self._zero.optimizer.param_groups:
            lr = rates.lr_prototypes if param_group["is_prototypes"] else rates.lr
            if rates.is_backbone_frozen and param_group["is_backbone"]:
                lr = 0.0
            param_group["lr"] = lr * param_group["lr_factor"]
            param_group["weight_decay"] = rates.weight_decay if param_group["is_decayed"] else 0.0
        skipped_before = self._engine.skipped_steps
        with self._as_world():
            if not self._backward(self.poison_if_nonfinite(loss)):
                return
            if self._divides:
                self.reduce_grad_norm()
            self._engine.step()
        if not self._judges:
            norm = float(self._engine.get_global_grad_norm())
            self.grad_norm = torch.full_like(self.grad_norm, norm)
            is_applied = self._engine.skipped_steps == skipped_before
            self.is_applied = torch.full_like(self.is_applied, is_applied)
        self._update_ema(rates.ema_momentum)

    def _backward(self, loss: Tensor) -> bool:
        """One micro-batch's gradients; returns whether it was the step's last, whose sum is then averaged over the group."""
        if self._added_up is not None:
            return self._added_up.backward(loss)
        self._engine.backward(loss * self._num_parts)  # DeepSpeed divides by it
        is_last = bool(self._engine.is_gradient_accumulation_boundary())
        if not is_last:
            self._engine.step()
        return is_last

    @torch.no_grad()
    def reduce_grad_norm(self) -> None:
        """The gradients' global norm, and from those of its parts what AdamW will do with them. One all-reduce over the group."""
        groups = self._zero.optimizer.param_groups
        squares = _squared_norms(_gradients_of(self._zero, groups), self.group)
        self._divisors = _divisors_of(squares, self._clip)
        self.grad_norm = torch.stack([*squares.values()]).sum().sqrt().float()
        self.is_applied = self.grad_norm.isfinite()
        if self._judges:
            self._adamw.found_inf = (~self.is_applied).float()

    def _take_divisor(self, adamw: Any, *_: object) -> None:
        """Before a parameter group is stepped, of which there is one at a time."""
        for each in adamw.param_groups:
            if each["params"] and each[CLIPPED_AS] in self._divisors:
                adamw.grad_scale = self._divisors[each[CLIPPED_AS]]

    @torch.no_grad()
    def _update_ema(self, momentum: float) -> None:
        """The EMA goes a step towards the weights if there was one. No communication."""
        for shard, state in zip(self._shards.weights, self._states, strict=True):
            ema = state["ema"]
            torch.where(self.is_applied, ema.lerp(shard, 1.0 - momentum), ema, out=ema)

    def poison_if_nonfinite(self, loss: Tensor) -> Tensor:
        """The loss; gradients of NaN where it or a weight of this rank's shards is not finite."""
        reached = torch.stack(
            [loss.detach().float(), *(shard.sum() for shard in self._shards.weights)]
        )
        return loss * (1.0 + 0.0 * reached.detach().sum())

    def full(
        self, kind: str, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Full tensors of one of ``STATE_KINDS`` by parameter name, fp32, on the host; nothing without ``collect``.

        ``into``: a state's host tensors by ``kind/name``, which are overwritten and returned. Communication:
        all-gathers over the group, which every rank of it must call.
        """
        tensors = {}
        for name, tensor in self._shards.full(self._values(kind), torch.float32):
            if collect:
                tensors[name] = to_host(tensor, None if into is None else into[f"{kind}/{name}"])
        return tensors

    def _values(self, kind: str) -> list[Tensor]:
        if kind == "weight":
            return [shard.detach() for shard in self._shards.weights]
        return [state[kind] for state in self._states]

    @torch.no_grad()
    def copy_ema_to(self, target: nn.Module) -> None:
        """Writes the EMA into the parameters of ``target`` with the same names. Collective over the group.

        Communication: the EMA in the target's dtype, unless both are sharded (stage 3) alike.
        """
        self._shards.copy_to(self._values("ema"), dict(target.named_parameters()))

    def state(
        self, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Everything needed to go on, independent of the layout: ``kind/name`` and ``step``. Communication and ``into`` as ``full``, four times."""
        tensors = {
            f"{kind}/{name}": tensor
            for kind in STATE_KINDS
            for name, tensor in self.full(kind, collect=collect, into=into).items()
        }
        step = self._states[0]["step"].reshape(1)
        tensors["step"] = to_host(step, None if into is None else into["step"])
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``, for any number of ranks and any stage. No communication."""
        for kind in STATE_KINDS:

            def full(name: str, kind: str = kind) -> Tensor:
                return tensors[f"{kind}/{name}"]

            if kind == "weight":
                self._shards.load(full)
                continue
            for state, part in zip(self._states, self._shards.rank_parts(full), strict=True):
                state[kind].copy_(part)
        for state in self._states:
            state["step"].copy_(tensors["step"][0])

    def steps_applied(self) -> int:
        """Returns how many steps made its state, those of before a resume too; skipped ones do not count. Waits for the device."""
        return int(self._states[0]["step"])

    def is_finite_here(self) -> Tensor:
        """Weights, moments and EMA of this rank's shards are finite, and so is the network it computes with."""
        tensors = [shard for each in self._local_shards() for shard in each.values()]
        tensors += self._shards.computed_with
        return torch.stack([tensor.sum().isfinite() for tensor in tensors]).all()

    def is_finite(self) -> bool:
        """The same of all ranks. Waits for the device; one all-reduce over the group."""
        finite = self.is_finite_here().float()
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self.group)
        return bool(finite)

    @torch.no_grad()
    def snapshot(self, into: StateSnapshot | None = None) -> StateSnapshot:
        """A copy of this rank's shards in host memory, 16 bytes per parameter over the group; ``into`` is overwritten. No communication."""
        shards_of = self._local_shards()
        if into is None:
            return [
                {kind: shard.to("cpu", copy=True) for kind, shard in e.items()} for e in shards_of
            ]
        for saved, shards in zip(into, shards_of, strict=True):
            for kind, shard in shards.items():
                saved[kind].copy_(shard)
        return into

    @torch.no_grad()
    def restore_snapshot(self, saved: StateSnapshot) -> None:
        """To the state that ``snapshot`` copied, on every rank of the group together. One all-gather per parameter group."""
        for shards, before in zip(self._local_shards(), saved, strict=True):
            for kind, shard in shards.items():
                shard.copy_(before[kind])
        self._shards.show_weights()

    @torch.no_grad()
    def restore_state(self, saved: Mapping[str, Tensor]) -> None:
        """To what ``state`` copied, of a group of one rank, whose full tensors are views of its shards: nothing new is allocated. No communication."""
        for kind in STATE_KINDS:
            for name, tensor in self._shards.full(self._values(kind), torch.float32):
                tensor.copy_(saved[f"{kind}/{name}"])
        for state in self._states:
            state["step"].copy_(saved["step"][0])
        self._shards.show_weights()

    def _local_shards(self) -> StateSnapshot:
        return [
            {"weight": shard.detach(), **state}
            for shard, state in zip(self._shards.weights, self._states, strict=True)
        ]


def to_host(tensor: Tensor, into: Tensor | None) -> Tensor:
    """A copy in host memory; ``into``, which is overwritten, saves new memory and what its first touch costs."""
    return tensor.to("cpu", copy=True) if into is None else into.copy_(tensor)


@torch.no_grad()
def _squared_norms(
    gradients: Mapping[str, Sequence[Tensor]], group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Squared norm of each part's gradients over all ranks, float64. One all-reduce of a number for each part; the parts are those of every rank."""
    squares = torch.stack(
        [
            torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in each])
            .square()
            .sum()
            for each in gradients.values()
        ]
    )
    if dist.get_world_size(group) > 1:
        with waiting_for_peers(squares.device):
            dist.all_reduce(squares, group=group)
    return dict(zip(gradients, squares.unbind(), strict=True))


def _divisors_of(squares: Mapping[str, Tensor], largest: float) -> dict[str, Tensor]:
    """What each part's gradients are divided by so that no norm is above ``largest``."""
    return {
        part: ((square.sqrt().float() + CLIP_EPS) / largest).clamp(min=1.0)
        for part, square in squares.items()
    }


def _gradients_of(zero: Any, groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """This rank's parts of the averaged gradients of a DeepSpeed optimizer, by the part of the network."""
    found: dict[str, list[Tensor]] = {each[CLIPPED_AS]: [] for each in groups}
    for index, gradients in zero.averaged_gradients.items():
        found[groups[index][CLIPPED_AS]] += gradients
    return found
