"""Whether loss and Sinkhorn of a head run in kernels that write no logits: on a GPU that solves a small problem with them as it is written."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from teacher.chunks import AS_WRITTEN, ChunkSteps, LogitSteps, sinkhorn
from teacher.heads import cross_entropy
from teacher.kernels import WIDEST, KernelSteps

LOWEST_CAPABILITY = (8, 0)  # products of bf16 in tensor cores
LIMIT = 3e-2  # of the gradients' length; weights are rounded to bf16, which has 8 bits


def logit_steps(prototypes: Tensor, chunks: ChunkSteps) -> tuple[LogitSteps, str]:
    """How a head with these prototypes goes through its logits, and why in chunks where a GPU might do without them.

    On a CPU always in chunks. Without communication; ranks may differ.
    """
    if prototypes.device.type != "cuda":
        return chunks, ""
    why = why_not(prototypes.device, prototypes.shape[1])
    if why:
        return chunks, f"loss and Sinkhorn go through logits in chunks: {why}"
    return KernelSteps(chunks), ""


@cache
def why_not(device: torch.device, width: int) -> str:
    """Why kernels do not serve a bottleneck of this width on a device; empty where they do. Makes the kernels."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, kernels need 8.0"
    if width > WIDEST:
        return f"a bottleneck of {width} is wider than {WIDEST}"
    try:
        difference = trial(device, width)
    except Exception as error:  # of Triton, its compiler, or the driver
        lines = str(error).strip().splitlines()
        return f"kernels fail ({lines[0][:200] if lines else type(error).__name__})"
    return "" if difference <= LIMIT else f"kernels differ by {difference:.2g} from what is written"


@torch.enable_grad()
def trial(device: torch.device, width: int) -> float:
    """The largest difference of kernels in bf16 to chunks in fp32: of log factors, loss and gradients, each by its length."""
    draw = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(70, width, generator=draw), dim=1)
    prototypes = torch.randn(300, width, generator=draw) * width**-0.5
    results = []
    for steps, dtype in ((KernelSteps(AS_WRITTEN), torch.bfloat16), (AS_WRITTEN, torch.float32)):
        bottleneck, columns = (
            each.to(torch.bfloat16).to(device, dtype) for each in (rows, prototypes)
        )
        student = bottleneck.flip(0)[None].requires_grad_()
        weight = columns.flip(0).requires_grad_()
        found = sinkhorn(bottleneck, columns, 0.07, None, steps)
        factors = torch.ones(1, 1, device=device), torch.full((70,), 1 / 70, device=device)
        loss = cross_entropy(student, weight, found, *factors, steps)
        gradients = torch.autograd.grad(loss, (student, weight))
        results.append([found.log_rows, found.log_columns, loss.detach(), *gradients])
    return max(
        float((one.float() - other).norm() / other.norm())
        for one, other in zip(*results, strict=True)
    )
