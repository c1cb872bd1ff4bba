"""What the kernels of ``teacher.tiles`` give in Triton's interpreter, and how large they are for a GPU; as JSON.

TRITON_INTERPRET=1 python -m tests.support.kernels loops      differences to nested loops
TRITON_INTERPRET=1 python -m tests.support.kernels values     differences to float64, and reruns
python -m tests.support.kernels compiled WIDTH [WIDTH...]     registers, spills and shared memory for sm_80 and sm_90
python -m tests.support.kernels launched                      how many kernels steps of two sizes make, on a GPU that is only said to be there

In a process of its own: the interpreter is chosen when a kernel is defined, and the suite's shape checks would wrap kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill.engine.logit_kernels import trial
from teacher import kernels
from teacher.chunks import AS_WRITTEN, LogitSteps, SoftAssignment, sinkhorn
from teacher.heads import cross_entropy
from teacher.kernels import TILINGS, KernelSteps, shape_of
from tests.teacher.test_losses import cross_entropy_oracle
from tests.teacher.test_sinkhorn import oracle

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TILED = KernelSteps(AS_WRITTEN, (F32, BF16))
NAMES = "log_rows", "log_columns", "loss", "by_student", "by_prototypes"
SMALL_TILES, LARGE_TILES = TILINGS[F32], TILINGS[BF16]


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison; ``rows`` are those of one target crop."""

    rows: int
    prototypes: int
    width: int
    target_width: int
    crops: int
    targets: int
    temperature: float


CASES = {
    "ten crops, two targets": Case(9, 101, 40, 24, 10, 2, 0.04),
    "masked patches": Case(70, 150, 48, 48, 1, 1, 0.07),
    "one row": Case(1, 5, 6, 6, 1, 1, 0.04),
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case."""

    bottleneck: Tensor
    target_prototypes: Tensor
    student: Tensor
    prototypes: Tensor
    mixture: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """In a dtype; mixture and weights are never in bf16."""
        factors = F32 if dtype == BF16 else dtype
        moved = {
            name: value.to(factors if name in ("mixture", "weights") else dtype)
            for name, value in vars(self).items()
        }
        return Inputs(**moved)


def inputs_of(case: Case, rounded: torch.dtype = F32) -> Inputs:
    """Drawn at the lengths of a head: bottlenecks of one, prototypes of about one."""
    draw = torch.Generator().manual_seed(case.rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    width, target_width = case.width, case.target_width
    return Inputs(
        normalize(normal(case.targets * case.rows, target_width), dim=1).to(rounded).double(),
        (normal(case.prototypes, target_width) * target_width**-0.5).to(rounded).double(),
        normalize(normal(case.crops, case.rows, width), dim=2).to(rounded).double(),
        (normal(case.prototypes, width) * width**-0.5).to(rounded).double(),
        torch.rand(case.crops, case.targets, generator=draw).double(),
        torch.rand(case.rows, generator=draw).double() / case.rows,
    )


def run(inputs: Inputs, temperature: float, steps: LogitSteps) -> list[Tensor]:
    """Both log factors of Sinkhorn, the loss, and its gradients."""
    student, prototypes = (
        each.detach().clone().requires_grad_() for each in (inputs.student, inputs.prototypes)
    )
    found = sinkhorn(inputs.bottleneck, inputs.target_prototypes, temperature, None, steps)
    loss = cross_entropy(student, prototypes, found, inputs.mixture, inputs.weights, steps)
    loss.backward()
    assert student.grad is not None and prototypes.grad is not None
    return [found.log_rows, found.log_columns, loss.detach(), student.grad, prototypes.grad]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Length of each difference over the length of what is expected."""
    pairs = zip(NAMES, found, expected, strict=True)
    return {name: _apart(mine, other) for name, mine, other in pairs}


def _apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def values() -> dict[str, Any]:
    """By case and dtype the differences to float64; and claims that hold or do not."""
    facts: dict[str, Any] = {}
    kernels.PROGRAMS = 4  # so that each walks over several tiles
    for name, case in CASES.items():
        for dtype in (F32, BF16):
            exact = inputs_of(case, dtype)
            expected = run(exact, case.temperature, AS_WRITTEN)
            TILINGS[F32] = SMALL_TILES if case.rows == 1 else LARGE_TILES
            found = run(exact.to(dtype), case.temperature, TILED)
            facts[f"{name}, {str(dtype).removeprefix('torch.')}"] = apart(found, expected)
        chunked = run(exact.to(BF16), case.temperature, AS_WRITTEN)
        facts[f"{name}, bfloat16 in chunks"] = apart(chunked, expected)
    facts["near its targets"] = _near_targets()
    facts["claims"] = {claim.__name__.strip("_"): claim() for claim in CLAIMS}
    return facts


def loops() -> dict[str, float]:
    """Against the nested loops, which know no logarithms and no chunks; and what a GPU is tried with."""
    case = Case(3, 11, 5, 6, 3, 2, 0.07)
    exact = inputs_of(case)
    student, prototypes = (each.requires_grad_() for each in (exact.student, exact.prototypes))
    logits = (exact.bottleneck @ exact.target_prototypes.T).tolist()
    targets = torch.tensor(oracle(logits, 0.07), dtype=F64)
    loss = cross_entropy_oracle(
        student, prototypes, targets.view(2, 3, 11), exact.mixture, exact.weights
    )
    gradients = torch.autograd.grad(loss, (student, prototypes))
    *factors, found_loss, by_student, by_prototypes = run(exact.to(F32), 0.07, TILED)
    rows, columns = exact.bottleneck.float(), exact.target_prototypes.float()
    found = SoftAssignment(rows, columns, *factors, temperature=0.07).columns(0, 11)
    pairs = zip(
        (found, found_loss, by_student, by_prototypes), (targets, loss, *gradients), strict=True
    )
    names = "assignment", *NAMES[2:]
    differences = {name: _apart(*pair) for name, pair in zip(names, pairs, strict=True)}
    return {**differences, "trial": trial(torch.device("cpu"), 16)}


def _near_targets() -> dict[str, float]:
    """A student that has almost learnt its targets: its gradient is a small difference of two means."""
    case = Case(24, 150, 40, 40, 2, 1, 0.1)
    exact = inputs_of(case, BF16)
    near = (exact.bottleneck + 0.02 * exact.student).to(BF16).double()
    exact = replace(exact, student=near, prototypes=exact.target_prototypes)
    exact = replace(exact, mixture=torch.ones_like(exact.mixture))
    expected = run(exact, case.temperature, AS_WRITTEN)
    tiled = apart(run(exact.to(BF16), case.temperature, TILED), expected)
    chunked = apart(run(exact.to(BF16), case.temperature, AS_WRITTEN), expected)
    return {**tiled, **{f"chunked_{name}": value for name, value in chunked.items()}}


def _a_rerun_has_the_same_bits() -> bool:
    inputs = inputs_of(CASES["ten crops, two targets"], BF16).to(BF16)
    first, second = (run(inputs, 0.04, TILED) for _ in range(2))
    return all(map(torch.equal, first, second))


def _one_share_equals_many() -> bool:
    inputs, programs, found = inputs_of(CASES["masked patches"]).to(F32), kernels.PROGRAMS, []
    for kernels.PROGRAMS in (1, 264):
        found.append(run(inputs, 0.04, TILED))
    kernels.PROGRAMS = programs
    return max(apart(*found).values()) < 1e-5


def _rows_without_a_target_add_nothing() -> bool:
    """Log factors of -inf, and weights of zero, as rows have that only fill a shape."""
    inputs = inputs_of(CASES["masked patches"]).to(F32)
    found = sinkhorn(inputs.bottleneck, inputs.target_prototypes, 0.07)
    log_rows, weights = found.log_rows.clone(), inputs.weights.clone()
    log_rows[10:], weights[10:] = -torch.inf, 0.0
    losses = []
    for count, factors in ((70, log_rows), (10, found.log_rows[:10])):
        cut = replace(found, bottleneck=found.bottleneck[:count], log_rows=factors)
        rows = inputs.student[:, :count], inputs.prototypes, cut, inputs.mixture, weights[:count]
        losses.append(cross_entropy(*rows, TILED))
    return abs(float(losses[0] / losses[1]) - 1.0) < 1e-6


def _no_rows_are_the_chunks_numbers() -> bool:
    inputs = inputs_of(CASES["one row"]).to(F32)
    none = replace(
        inputs,
        bottleneck=inputs.bottleneck[:0],
        student=inputs.student[:, :0],
        weights=inputs.weights[:0],
    )
    tiled, chunked = (run(none, 0.04, steps) for steps in (TILED, AS_WRITTEN))
    return all(map(torch.equal, tiled, chunked))


CLAIMS: Sequence[Callable[[], bool]] = (
    _a_rerun_has_the_same_bits,
    _one_share_equals_many,
    _rows_without_a_target_add_nothing,
    _no_rows_are_the_chunks_numbers,
)


def compiled(widths: Sequence[int]) -> dict[str, dict[str, int]]:
    """Registers of a thread, bytes that spill from them, and shared memory of a program, by kernel, width and GPU."""
    facts = {}
    for width in widths:
        shape = shape_of(width)
        for name, (kernel, fixed) in _kernels(shape).items():
            for capability in (80, 90):
                facts[f"{name}, width {width}, sm_{capability}"] = _size(kernel, fixed, capability)
    return facts


def _kernels(shape: tuple[int, int, int]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each use of a kernel, with the arguments that are fixed when it is compiled."""
    from teacher import tiles

    tiling = TILINGS[BF16]
    block = {"block": tiling.block, "key_block": tiling.key_block}
    gather = {**block, "shape": shape, "value_shape": shape}
    merged = {"block": kernels.MERGED_ROWS, "column_block": kernels.MERGED_COLUMNS}
    alone = {"values": None, "log_rows": None, "sums": None, "value_shape": None}
    return {
        "log sums": (tiles.gather, {**gather, **alone}),
        "student": (tiles.gather, {**gather, "values": None, "log_rows": None, "log_keys": None}),
        "teacher": (tiles.gather, {**gather, "peaks": None}),
        "merge": (tiles.merge, {**merged, "width": shape[0]}),
        "gradient of prototypes": (tiles.scatter, {**block, "shape": shape, "target_shape": shape}),
    }


def _size(kernel: Any, fixed: dict[str, Any], capability: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: _type_of(name) for name in kernel.arg_names}
    types |= dict.fromkeys(fixed, "constexpr")
    indices = {name: (kernel.arg_names.index(name),) for name in types}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        types,
        {indices[name]: value for name, value in fixed.items()},
        {indices[name]: aligned for name, text in types.items() if text.startswith("*")},
    )
    tiling = TILINGS[BF16]
    warps = 4 if "num_shares" in types else tiling.warps
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": tiling.stages},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": int(made.metadata.shared),
    }


class _SaidToBeThere:
    """A driver for which Triton makes kernels as at a launch."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def launched() -> dict[str, list[int]]:
    """By kernel how many were made after a step, and after one of other numbers of rows. Nothing runs."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from teacher import tiles

    driver.set_active(_SaidToBeThere())
    start = JITFunction.run

    def make(kernel: Any, *args: Any, warmup: bool, **fixed: Any) -> Any:
        return start(kernel, *args, warmup=True, **fixed)

    JITFunction.run = make
    counts: dict[str, list[int]] = {"gather": [], "merge": [], "scatter": []}
    for rows in (70, 71):
        run(inputs_of(Case(rows, 300, 40, 24, 10, 2, 0.04)).to(BF16), 0.04, TILED)
        for name, found in counts.items():
            found.append(len(getattr(tiles, name).device_caches[0][0]))
    return counts


FP32_POINTERS = {
    *("log_rows", "log_keys", "peaks", "totals", "sums", "levels"),
    *("log_student", "factors", "log_columns"),
}


def _type_of(name: str) -> str:
    if name in FP32_POINTERS:
        return "*fp32"
    if name.endswith("sharpness"):
        return "fp32"
    return "i32" if name.startswith("num_") or name == "share" else "*bf16"


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["loops"]:
            facts = loops()
        case ["values"]:
            facts = values()
        case ["launched"]:
            facts = launched()
        case ["compiled", *widths]:
            facts = compiled([int(width) for width in widths])
        case _:
            raise SystemExit(__doc__)
    sys.stdout.write(json.dumps(facts, indent=1))
