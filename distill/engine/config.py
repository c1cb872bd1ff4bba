"""How one network is optimised: its settings, its parameter groups, and what DeepSpeed is configured with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

CLIPPED_AS = "clipped_as"  # of a parameter group: the part of the network that it is clipped with
ONE_GROUP = 10**12  # numbers; a parameter group is never split
MOST_AT_ONCE = 500_000_000  # gradients that are reduced together, DeepSpeed's limit


@dataclass(frozen=True)
class EngineSettings:
    """How one network is optimised. ``precision`` is "fp32" or "bf16" (fp32 master weights either way).

    A step's gradient is the sum of ``num_parts`` micro-batches', added up in fp32: under stage 1 before it is reduced
    (``distill.engine.added_up``), under stages 2 and 3 by DeepSpeed afterwards.
    ``lr_factor``: of a parameter's learning rate, by its name. ``freezes_backbone``: some steps do not train
    what is named ``backbone.``. ``first_id``: where stage 3 counts this network's parameters from, the same
    on every rank, another for every network. ``clip_by``: "network", or "module" for a norm of the backbone
    and one of each head. ``decays_tokens``: weight decay of class, register and mask tokens too.
    """

    zero_stage: int
    precision: str
    gradient_clip: float
    images_per_rank: int
    num_parts: int = 1
    beta2: float = 0.99
    lr_factor: Callable[[str], float] = lambda _: 1.0
    first_id: int = 0
    clip_by: str = "network"
    freezes_backbone: bool = False
    decays_tokens: bool = False

    @property
    def deepspeed_parts(self) -> int:
        """Micro-batches that DeepSpeed adds up; the others reach it as one."""
        return 1 if self.zero_stage == 1 else self.num_parts


def part_of(parameter: str, clip_by: str) -> str:
    """Returns the part of a task that a parameter is clipped with: its top module (``backbone``, ``dino_head``), or all."""
    return parameter.partition(".")[0] if clip_by == "module" else ""


def parameter_groups(module: nn.Module, settings: EngineSettings) -> list[dict[str, Any]]:
    """Trained parameters in as few groups as differ: matrices, vectors (no weight decay), prototypes and a frozen backbone (separate learning rate), each by its factor and what it is clipped with."""
    kinds: dict[tuple[bool, bool, bool, float, str], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_prototypes = ".prototypes." in name
        is_token = name.endswith(("_token", "_tokens"))
        is_decayed = parameter.ndim > 1 and (settings.decays_tokens or not is_token)
        is_backbone = settings.freezes_backbone and name.startswith("backbone.")
        clipped_as = part_of(name, settings.clip_by)
        kind = (is_prototypes, is_decayed, is_backbone, settings.lr_factor(name), clipped_as)
        kinds.setdefault(kind, []).append(parameter)
    keys = "is_prototypes", "is_decayed", "is_backbone", "lr_factor", CLIPPED_AS
    return [
        {"params": parameters, **dict(zip(keys, kind, strict=True))}
        for kind, parameters in kinds.items()
    ]


def deepspeed_config(settings: EngineSettings, num_parameters: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of one engine; ``num_parameters``: of its network."""
    adds_halves = settings.precision == "bf16" and settings.deepspeed_parts > 1
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(MOST_AT_ONCE, num_parameters),  # all of it is taken at every step
    }
    if settings.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
            "sub_group_size": ONE_GROUP,
        }
    else:
        zero |= {"compute_grad_norm": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, settings.images_per_rank),
        "gradient_accumulation_steps": settings.deepspeed_parts,
        "gradient_clipping": settings.gradient_clip
        if settings.zero_stage == 3 and settings.clip_by == "network"
        else 0.0,
        "zero_optimization": zero,
    }
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if adds_halves:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
