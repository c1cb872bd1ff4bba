"""How large each check is: ``full`` for one GPU of 80 GB, ``tiny`` for a CPU in the test suite."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from students.shapes import CATALOG, BackboneSpec, ConvNeXtSpec
from teacher.shapes import HeadShape, ViTSpec


@dataclass(frozen=True)
class Crops:
    """Crops of one image, and masked patches of its global crops."""

    global_size: int = 256
    local_size: int = 112
    num_locals: int = 8
    masked: int = 77


@dataclass(frozen=True)
class JobSizes:
    """The small job: its steps, a save after every so many, and where the rank pauses to be stopped and killed."""

    steps: int = 12
    save_every: int = 4
    pause_after: int = 6
    start_s: float = 90.0  # for a rank to reach its pause
    limit_s: float = 4.0  # of the watchdog


@dataclass(frozen=True)
class Sizes:
    """Sizes of all checks.

    ``operator``: width of the networks whose operators are compared. ``heads``: of a teacher, at any width.
    ``images``: at once, by network; ``images_default`` for the others. ``memory``: images at once by
    student, compared with the plan. ``bench_is_tiny``: two tiny students in the place of ``recipes/bench_cpu.yaml``. ``gpu_tests``: files.
    """

    name: str
    teacher: ViTSpec
    networks: Mapping[str, BackboneSpec]
    heads: tuple[HeadShape, HeadShape]
    student_hidden: tuple[int, int]
    crops: Crops
    teacher_images: tuple[int, ...]
    compiled_images: tuple[int, ...]
    compile_backend: str
    matmul_side: int
    repeats: int
    operator_width: int
    images: Mapping[str, int]
    images_default: int
    memory: Mapping[str, int]
    memory_overrides: tuple[str, ...]
    bench_is_tiny: bool
    gpu_tests: tuple[str, ...]
    gpu_tests_s: float
    job: JobSizes = field(default_factory=JobSizes)


GPU_TESTS = (
    "tests/teacher/test_task.py",
    "tests/students/test_student.py",
    "tests/distill/protocols/test_knn.py",
    "tests/distill/train/test_waits.py",
    "tests/distill/bench/test_measure.py",
)

FULL = Sizes(
    name="full",
    teacher=CATALOG["vit7b16"],  # type: ignore[arg-type]  # it is a ViT
    networks=CATALOG,
    heads=(HeadShape(4096, 8192, 512, 262_144), HeadShape(4096, 4096, 384, 98_304)),
    student_hidden=(2048, 2048),
    crops=Crops(),
    teacher_images=(1, 2, 4, 8, 16, 32),
    compiled_images=(2, 16),
    compile_backend="inductor",
    matmul_side=8192,
    repeats=5,
    operator_width=384,
    images={"vit7b16": 1, "vith16plus": 8},
    images_default=16,
    memory={"vits16": 16, "vitb16": 16, "vitl16": 16},
    memory_overrides=("teacher.arch=vits16", "engine.lookahead=0", "engine.precision=bf16"),
    bench_is_tiny=False,
    gpu_tests=GPU_TESTS,
    gpu_tests_s=90.0,
)


def _small(spec: BackboneSpec) -> BackboneSpec:
    """A network of the same kind that a CPU trains at once."""
    if isinstance(spec, ConvNeXtSpec):
        return ConvNeXtSpec((1, 1, 1, 1), (4, 4, 8, 8))
    assert isinstance(spec, ViTSpec), "the catalogue has two kinds"
    return ViTSpec(16, 1, 2, 32, ffn=spec.ffn, qv_bias=spec.qv_bias)


TINY = Sizes(
    name="tiny",
    teacher=ViTSpec(16, 2, 2, 32, ffn="swiglu", qv_bias=False),
    networks={name: _small(spec) for name, spec in CATALOG.items()},
    heads=(HeadShape(16, 16, 8, 24), HeadShape(16, 16, 8, 24)),
    student_hidden=(16, 16),
    crops=Crops(64, 32, 2, 6),
    teacher_images=(1, 2),
    compiled_images=(1,),
    compile_backend="eager",
    matmul_side=64,
    repeats=1,
    operator_width=32,
    images={"vit7b16": 1},
    images_default=2,
    memory={"tiny": 2},
    memory_overrides=(),
    bench_is_tiny=True,
    gpu_tests=GPU_TESTS[:1],
    gpu_tests_s=110.0,
    job=JobSizes(steps=6, save_every=2, pause_after=3, limit_s=2.0),
)

BY_NAME = {sizes.name: sizes for sizes in (FULL, TINY)}
