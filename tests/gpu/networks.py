"""Networks, batches and targets that are made on the device: nothing of the size of a 7B passes through the host."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from students.shapes import BackboneSpec, student_heads
from tests.gpu.clock import is_out_of_memory, release
from tests.gpu.sizes import Sizes

if TYPE_CHECKING:
    from teacher.batch import StudentBatch
    from teacher.frozen import FrozenTeacher
    from teacher.task import DistillationTask, SoftAssignments, StepScalars

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 0.07
DTYPE = torch.bfloat16  # what a family trains in on a GPU


def made(
    build: Callable[[], nn.Module],
    init: Callable[[nn.Module, torch.Generator], None],
    device: torch.device,
    dtype: torch.dtype = DTYPE,
) -> nn.Module:
    """A network of the meta device, then on ``device`` in ``dtype``, then with fresh weights."""
    with torch.device("meta"):
        network = build()
    network = network.to(dtype).to_empty(device=device)
    init(network, torch.Generator(device=device).manual_seed(0))
    return network


def build_heads(
    shapes: tuple[object, object], device: torch.device, dtype: torch.dtype = DTYPE
) -> tuple[nn.Module, nn.Module]:
    """Both heads of the shapes."""
    from teacher.heads import Head, init_head_

    dino, ibot = (made(lambda s=s: Head(s), init_head_, device, dtype) for s in shapes)  # type: ignore[misc,arg-type]
    return dino, ibot


def build_teacher(
    device: torch.device, sizes: Sizes, micro_images: int, *, has_heads: bool = True
) -> "FrozenTeacher":
    """The frozen teacher."""
    from teacher.frozen import FrozenTeacher

    spec = sizes.teacher
    backbone = made(spec.build, spec.init_, device)
    heads = build_heads(sizes.heads, device) if has_heads else (None, None)
    return FrozenTeacher(backbone, *heads, mean=MEAN, std=STD, micro_images=micro_images)  # type: ignore[arg-type]


def build_task(spec: BackboneSpec, device: torch.device, sizes: Sizes) -> "DistillationTask":
    """A student with heads and loss, alone in its group."""
    from teacher.task import DistillationTask, TaskOptions

    backbone = made(spec.build, spec.init_, device)
    heads = build_heads(student_heads(spec.width, *sizes.heads, *sizes.student_hidden), device)
    options = TaskOptions(masks_input=False, mean=MEAN, std=STD)
    return DistillationTask(backbone, *heads, options, None, 1, koleo_is_local=True)  # type: ignore[arg-type]


def scalars() -> "StepScalars":
    """Weights of a family's objective."""
    from teacher.losses import Objective
    from teacher.task import StepScalars

    return StepScalars(Objective(1.0, 1.0, 0.1, 1.0), 1.0, 1.0)


def unit_rows(rows: int, width: int, device: torch.device, seed: int) -> Tensor:
    """Random rows of length one, as bottlenecks are."""
    generator = torch.Generator(device=device).manual_seed(seed)
    drawn = torch.randn(rows, width, device=device, generator=generator)
    return nn.functional.normalize(drawn, dim=1).to(DTYPE)


def build_batch(images: int, device: torch.device, sizes: Sizes) -> "StudentBatch":
    """Random crops, masks and targets of some images."""
    from teacher.batch import CropBatch, PatchMasks, StudentBatch, TeacherTargets

    crops, generator = sizes.crops, torch.Generator(device=device).manual_seed(1)

    def pixels(count: int, size: int) -> Tensor:
        shape = (images, count, 3, size, size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    side = crops.global_size // sizes.teacher.patch
    flags = torch.zeros(images, 2 * side**2, dtype=torch.bool, device=device)
    flags[:, : crops.masked] = True
    masks = PatchMasks(flags.view(images, 2, side**2), (crops.masked,) * images)
    dino, ibot = sizes.heads
    class_rows = unit_rows(2 * images, dino.bottleneck, device, 2).unflatten(0, (images, 2))
    patch_rows = unit_rows(images * crops.masked, ibot.bottleneck, device, 3)
    return StudentBatch(
        CropBatch(pixels(2, crops.global_size), pixels(crops.num_locals, crops.local_size)),
        masks,
        TeacherTargets(class_rows, patch_rows),
        (side, side),
        0,
        images,
    )


@dataclass(frozen=True)
class TeacherPrototypes:
    """Last layers of the teacher's heads, which Sinkhorn compares with."""

    dino: Tensor
    ibot: Tensor

    def assign(self, batch: "StudentBatch") -> "SoftAssignments":
        """The targets of a batch."""
        from teacher.chunks import sinkhorn
        from teacher.task import SoftAssignments

        rows = batch.targets.class_features.transpose(0, 1).flatten(0, 1)
        return SoftAssignments(
            sinkhorn(rows, self.dino, TEMPERATURE),
            sinkhorn(batch.targets.patch_features, self.ibot, TEMPERATURE),
        )


def build_prototypes(device: torch.device, sizes: Sizes) -> TeacherPrototypes:
    """Random prototypes of the teacher's shapes."""
    dino, ibot = sizes.heads
    return TeacherPrototypes(
        unit_rows(dino.prototypes, dino.bottleneck, device, 4),
        unit_rows(ibot.prototypes, ibot.bottleneck, device, 5),
    )


def halving(images: int, device: torch.device, work: Callable[[int], object]) -> int:
    """How many images fit: calls ``work`` with half as many until the device has room.

    Raises:
        torch.OutOfMemoryError: one image does not fit.
    """
    while True:
        try:
            work(images)
            return images
        except RuntimeError as error:
            if not is_out_of_memory(error) or images == 1:
                raise
        images //= 2
        release(device)
