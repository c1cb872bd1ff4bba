"""Gradients of a step's micro-batches, added up on each rank in fp32 and reduced over the group once.

DeepSpeed's stage 1 adds up in the network's precision, where late micro-batches of bf16 round away; its stage 2
reduces every micro-batch, n times the bytes. Here each rank adds up those it computes, and the sum is rounded and
reduced once, as the gradient of a step without micro-batches is. That takes 4 bytes a parameter in bf16 and none in
fp32. A network whose gradients are sharded (stages 2 and 3) has no room for them and reduces every micro-batch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.engine.deepspeed_private import OF_ADDING, require_attributes


class AddedUp:
    """The micro-batches of one network's step, under DeepSpeed's stage 1."""

    def __init__(
        self, engine: Any, optimizer: Any, parameters: Iterable[nn.Parameter], num_parts: int
    ) -> None:
        """``engine``, ``optimizer``: DeepSpeed's, which reduce nothing by themselves from now on."""
        require_attributes(optimizer, OF_ADDING)
        engine.enable_backward_allreduce = False
        optimizer._coalesce_grad_reduction = True
        self._engine, self._optimizer = engine, optimizer
        self._parameters = [each for each in parameters if each.requires_grad]
        self._num_parts, self._done = num_parts, 0
        self._sums: list[Tensor] = []

    def backward(self, loss: Tensor) -> bool:
        """Adds the gradient of one micro-batch's ``loss``; returns whether it was the step's last, whose sum is reduced.

        Communication: at the last one DeepSpeed's, of the network's bytes once.
        """
        self._engine.backward(loss)
        self._done = (self._done + 1) % self._num_parts
        is_last = self._done == 0
        self._add(is_last=is_last)
        if is_last:
            self._optimizer.setup_buckets()
            self._engine.allreduce_gradients()
        return is_last

    @torch.no_grad()
    def _add(self, *, is_last: bool) -> None:
        """fp32 gradients add up by themselves; those of bf16 are taken at every micro-batch and come back as one."""
        halves = [p for p in self._parameters if p.dtype != torch.float32]
        gradients = [parameter.grad for parameter in halves if parameter.grad is not None]
        if not gradients:
            return
        if self._sums:
            torch._foreach_add_(self._sums, gradients)
        else:
            self._sums = [gradient.float() for gradient in gradients]
        if is_last:
            torch._foreach_copy_(gradients, self._sums)
            self._sums = []
            return
        for parameter in halves:
            parameter.grad = None
