"""One group of ranks in place of the world, for DeepSpeed, which assumes that its engine owns the world."""

import functools
from typing import Any

import torch
import torch.distributed as dist

from teacher.peers import waiting_for_peers


class GroupLayout:
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


class GroupAsWorld:
    """DeepSpeed's communication backend with one group in place of the world.

    Collectives that name no group, or name the world, use the group; a root given as a rank of the
    small world is translated. Each attribute is looked up, and wrapped, once.
    """

    def __init__(self, backend: Any, group: dist.ProcessGroup, device: torch.device) -> None:
        """``device``: whose stream stands while a collective waits for other ranks."""
        self._backend, self._group, self._device = backend, group, device
        # called some 180 times in a step, and constant
        self.get_rank = functools.cache(self._rank)
        self.get_world_size = functools.cache(self._world_size)

    def _or_default(self, group: Any) -> Any:
        return self._group if group is None or group is dist.group.WORLD else group

    def _rank(self, group: Any = None) -> int:
        return dist.get_rank(self._or_default(group))

    def _world_size(self, group: Any = None) -> int:
        return dist.get_world_size(self._or_default(group))

    def get_global_rank(self, group: Any, group_rank: int) -> int:
        return dist.get_global_rank(self._or_default(group), group_rank)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backend, name)
        if name not in _GROUPED and name not in _ROOTED:
            self.__dict__[name] = function
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            index = _GROUP_ARGUMENT.get(name)
            if index is not None and len(args) > index:
                args = (*args[:index], self._or_default(args[index]), *args[index + 1 :])
                return function(*args, **kwargs)
            is_world = kwargs.get("group") is None or kwargs["group"] is dist.group.WORLD
            kwargs["group"] = self._or_default(kwargs.get("group"))
            root = _ROOTED.get(name)
            if root is not None and is_world and kwargs.get(root) is not None:
                kwargs[root] = dist.get_global_rank(self._group, kwargs[root])
            return function(*args, **kwargs)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with waiting_for_peers(self._device):
                return call(*args, **kwargs)

        self.__dict__[name] = chosen = marked if self._device.type == "cuda" else call
        return chosen
