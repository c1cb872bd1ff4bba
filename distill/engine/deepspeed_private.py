"""Every private name of DeepSpeed that this package uses, and the check that the installed version has it.

None of these is promised to stay. The check runs before the first engine is built, and for a network's
optimizer when its layout is read: a version without one of them is refused by name before anything is trained.
"""

import inspect
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from distill.errors import SetupError

TESTED = "0.19.8"  # the version in constraints.txt
OF_PROCESS = (
    "deepspeed.comm.torch:build_shm_op",
    "deepspeed.comm.comm:cdb",
    "deepspeed.utils.groups:mpu",
    "deepspeed.runtime.engine:DeepSpeedEngine.is_gradient_accumulation_boundary",
    "deepspeed.runtime.engine:DeepSpeedEngine.get_global_grad_norm",
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload._register_deepspeed_module",
    "deepspeed.runtime.zero.partition_parameters:Init.param_id",
)
# of the optimizer of stages 1 and 2, of stage 1 with micro-batches, of the optimizer of stage 3, of a parameter under stage 3
OF_FLAT = ("single_partition_of_fp32_groups", "bit16_groups_flat", "bit16_groups")
OF_ADDING = ("_coalesce_grad_reduction", "setup_buckets", "reduce_gradients")
OF_PIECES = ("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "fp16_groups")
OF_PARAMETER = ("ds_numel", "ds_shape", "partition_numel")


def require_private_names(names: Iterable[str] = OF_PROCESS) -> None:
    """Checks names written as ``module:attribute.attribute``.

    Raises:
        SetupError: the installed DeepSpeed lacks one; the message has its version and the one tested.
    """
    for name in names:
        module, _, attributes = name.partition(":")
        try:
            found: Any = import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError):
            _refuse(name.replace(":", "."))
    counter = inspect.unwrap(_register()).__defaults__
    if not counter or not isinstance(counter[0], list):
        _refuse("DeepSpeedZeRoOffload._register_deepspeed_module's counter of modules")


def require_attributes(found: Any, names: Iterable[str]) -> None:
    """Checks that an object of DeepSpeed has some attributes; ``SetupError`` names the first one missing."""
    for name in names:
        if not hasattr(found, name):
            _refuse(f"{type(found).__name__}.{name}")


def count_from(first_id: int) -> None:
    """Sets where stage 3's numbers of parameters and modules go on: they are compared between ranks that hold other engines."""
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = first_id
    inspect.unwrap(_register()).__defaults__[0][0] = first_id


def _register() -> Any:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    return DeepSpeedZeRoOffload._register_deepspeed_module


def _refuse(name: str) -> None:
    raise SetupError(
        f"deepspeed = {version('deepspeed')}: it has no {name}, which this program uses; "
        f"tested with {TESTED}",
        fix=f"Install the tested version: pip install deepspeed=={TESTED}",
    )
