"""Sinkhorn and the cross-entropy without logits in memory: operators that rebuild them tile by tile, for CUDA with Triton.

Everything is one operation, a *gather*: ``sum_k exp(x_n . v_k * sharpness + log_rows[n] + log_columns[k]) * u_k``.

    rows of Sinkhorn       logarithm of a gather over prototypes, without values
    columns of Sinkhorn    the same with rows and prototypes in each other's place
    student                gather over prototypes whose values are the prototypes: log-sum-exp, and the softmax's mean prototype
    teacher                gather by its assignment, whose values are the student's prototypes: the target's mean prototype
    loss                   ``mass * log_total - student . target / 0.1``, both means by then being small tensors
    by the student         ``(mass * softmax mean - target mean) / 0.1``: no second pass
    by the prototypes      two gathers with prototypes in the place of rows, in one kernel (``scatter``)

Memory and traffic are [rows, bottleneck] and [prototypes, bottleneck]. Products are eight where the chunks have six, since
nothing but the log factors is kept, and Sinkhorn's are six where the chunks have four. Kernels are in ``teacher.tiles``,
which needs Triton; the operators are here, with shapes for the meta device and FLOPs, so that a step can be counted without it.

Source: online log-sum-exp as in Milakov and Gimelshein 2018; Dao et al. 2022 for sums beside it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from teacher.chunks import STUDENT_TEMPERATURE, LogitSteps, SoftAssignment

WIDEST = 512  # bottleneck whose sums fit into the registers of one program
PROGRAMS = 264  # two for each processor of an H100; fixed, so that bits do not depend on the GPU
NARROWEST_TILE = 16
STUDENT_SHARPNESS = 1.0 / STUDENT_TEMPERATURE
MERGED_ROWS, MERGED_COLUMNS = 16, 64


@dataclass(frozen=True)
class Tiling:
    """Rows and keys of a tile, and warps and pipeline stages of a program, for one dtype."""

    block: int
    key_block: int
    warps: int
    stages: int


TILINGS = {
    torch.bfloat16: Tiling(64, 32, 8, 2),
    torch.float32: Tiling(16, 16, 8, 1),
}

LIBRARY = torch.library.Library("distill", "DEF")
LIBRARY.define(
    "gather_tiles(Tensor rows, Tensor keys, Tensor? values, Tensor? log_rows, Tensor? log_keys, "
    "float sharpness, bool has_sums) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "merge_shares(Tensor peaks, Tensor totals, Tensor sums, bool has_peaks, bool has_sums) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "scatter_tiles(Tensor prototypes, Tensor student, Tensor log_student, Tensor factors, Tensor targets, "
    "Tensor bottleneck, Tensor pulls, Tensor log_columns, Tensor log_rows, float sharpness) -> Tensor"
)


def shape_of(width: int) -> tuple[int, int, int]:
    """A width and the two powers of two that it is cut into, the second of which may be 0."""
    main = max(NARROWEST_TILE, 1 << (width.bit_length() - 1))
    rest = max(0, width - main)
    return width, main, max(NARROWEST_TILE, 1 << (rest - 1).bit_length()) if rest else 0


def shares_of(num_rows: int, num_keys: int, tiling: Tiling) -> tuple[int, int]:
    """How many keys a program walks over, and how many such shares there are: few rows are shared by many programs."""
    blocks = -(-num_rows // tiling.block)
    wanted = max(1, PROGRAMS // max(1, blocks))
    share = -(-num_keys // (wanted * tiling.key_block)) * tiling.key_block
    return share, -(-num_keys // share)


def _gather(
    rows: Tensor,
    keys: Tensor,
    values: Tensor | None,
    log_rows: Tensor | None,
    log_keys: Tensor | None,
    sharpness: float,
    has_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from teacher import tiles

    peaks, totals, sums = _gather_empty(rows, keys, values, log_rows, log_keys, sharpness, has_sums)
    tiling = TILINGS[rows.dtype]
    share, shares = shares_of(len(rows), len(keys), tiling)
    grid = -(-len(rows) // tiling.block), shares
    tiles.gather[grid](
        *(rows, keys, values, log_rows, log_keys),
        *(peaks if log_rows is None else None, totals, sums if has_sums else None),
        *(len(rows), len(keys), share, sharpness),
        shape=shape_of(rows.shape[1]),
        value_shape=shape_of(sums.shape[2]) if has_sums else None,
        **_launch(tiling),
    )
    return peaks, totals, sums


def _launch(tiling: Tiling) -> dict[str, int]:
    return {
        "block": tiling.block,
        "key_block": tiling.key_block,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


def _gather_empty(
    rows: Tensor,
    keys: Tensor,
    values: Tensor | None,
    log_rows: Tensor | None,
    _log_keys: Tensor | None,
    _sharpness: float,
    has_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, shares = shares_of(len(rows), len(keys), TILINGS[rows.dtype])
    width = (keys if values is None else values).shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=rows.device)

    peaks = empty(shares if log_rows is None else 0, len(rows))
    return peaks, empty(shares, len(rows)), empty(shares if has_sums else 0, len(rows), width)


def _merge(
    peaks: Tensor, totals: Tensor, sums: Tensor, has_peaks: bool, has_sums: bool
) -> tuple[Tensor, Tensor]:
    from teacher import tiles

    level, value = _merge_empty(peaks, totals, sums, has_peaks, has_sums)
    shares, rows = totals.shape
    width = sums.shape[2] if has_sums else 1
    grid = -(-rows // MERGED_ROWS), -(-width // MERGED_COLUMNS)
    tiles.merge[grid](
        *(peaks if has_peaks else None, totals, sums if has_sums else None),
        *(level, value if has_sums else None, rows, shares),
        width=width,
        block=MERGED_ROWS,
        column_block=MERGED_COLUMNS,
        num_warps=4,
    )
    return level, value


def _merge_empty(
    _peaks: Tensor, totals: Tensor, sums: Tensor, _has_peaks: bool, has_sums: bool
) -> tuple[Tensor, Tensor]:
    rows = totals.shape[1]
    return totals.new_empty(rows), sums.new_empty(rows if has_sums else 0, sums.shape[2])


def _scatter(prototypes: Tensor, *others: Any) -> Tensor:
    from teacher import tiles

    student, _, _, targets, bottleneck, *_, sharpness = others
    gradient = torch.empty_like(prototypes)
    tiling = TILINGS[prototypes.dtype]
    tiles.scatter[(-(-len(prototypes) // tiling.block),)](
        *(prototypes, *others[:-1], gradient),
        *(len(prototypes), len(student), len(bottleneck), STUDENT_SHARPNESS, sharpness),
        shape=shape_of(prototypes.shape[1]),
        target_shape=shape_of(targets.shape[1]),
        **_launch(tiling),
    )
    return gradient


def _scatter_empty(prototypes: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(prototypes)


for _name, _kernel, _shapes in (
    ("gather_tiles", _gather, _gather_empty),
    ("merge_shares", _merge, _merge_empty),
    ("scatter_tiles", _scatter, _scatter_empty),
):
    LIBRARY.impl(_name, _kernel, "CUDA")
    LIBRARY.impl(_name, _kernel, "CPU")  # with Triton's interpreter
    LIBRARY.impl(_name, _shapes, "Meta")
OPERATORS = torch.ops.distill


@register_flop_formula(OPERATORS.gather_tiles)
def _gather_flops(rows: Any, keys: Any, values: Any, *rest: Any, **_: Any) -> int:
    """Of shapes, in the order of the operator's arguments."""
    has_sums = rest[-1]
    width = rows[1] + (has_sums and (keys if values is None else values)[1])
    return int(2 * rows[0] * keys[0] * width)


@register_flop_formula(OPERATORS.scatter_tiles)
def _scatter_flops(prototypes: Any, student: Any, *rest: Any, **_: Any) -> int:
    """Of shapes, in the order of the operator's arguments."""
    targets, bottleneck, width = rest[2], rest[3], prototypes[1]
    of_rows = student[0] * 2 * width + bottleneck[0] * (width + targets[1])
    return int(2 * prototypes[0] * of_rows)


def log_sums(
    rows: Float[Tensor, "rows width"],
    keys: Float[Tensor, "keys width"],
    log_keys: Float[Tensor, " keys"] | None,
    sharpness: float,
) -> Float[Tensor, " rows"]:
    """``log sum_k exp(x_n . v_k * sharpness + log_keys[k])`` of each row, fp32; -inf without keys."""
    if not len(rows) or not len(keys):
        return torch.full((len(rows),), -torch.inf, dtype=torch.float32, device=rows.device)
    parts = OPERATORS.gather_tiles(rows, keys, None, None, log_keys, sharpness, False)
    return OPERATORS.merge_shares(*parts, True, False)[0]


@dataclass(frozen=True)
class KernelSteps:
    """Logits in tiles, for inputs of ``dtypes`` no wider than 512; all others, and tensors without rows, ``otherwise``. The bits of a rerun are the same."""

    otherwise: LogitSteps
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)  # of fp32 the library's products are faster

    def columns(
        self,
        bottleneck: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        log_columns: Float[Tensor, " prototypes"] | None,
        temperature: float,
    ) -> tuple[Float[Tensor, " prototypes"], Float[Tensor, " prototypes"]]:
        """As ``LogitSteps``: a pass for the rows, if there is a balance yet, and one for the columns."""
        if not self._suits(bottleneck, prototypes):
            return self.otherwise.columns(bottleneck, prototypes, log_columns, temperature)
        log_rows = None
        if log_columns is not None:
            log_rows = self.rows(bottleneck, prototypes, log_columns, temperature)
        found = log_sums(prototypes, bottleneck.contiguous(), log_rows, 1.0 / temperature)
        return found, torch.ones_like(found)

    def rows(
        self,
        bottleneck: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        log_columns: Float[Tensor, " prototypes"],
        temperature: float,
    ) -> Float[Tensor, " rows"]:
        """As ``LogitSteps``."""
        if not self._suits(bottleneck, prototypes):
            return self.otherwise.rows(bottleneck, prototypes, log_columns, temperature)
        return -log_sums(bottleneck.contiguous(), prototypes, log_columns, 1.0 / temperature)

    def cross_entropy(
        self,
        student: Float[Tensor, "crops rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """As ``LogitSteps``."""
        tensors = student.flatten(0, 1), prototypes, assignment.bottleneck, assignment.prototypes
        if not self._suits(*tensors):
            return self.otherwise.cross_entropy(student, prototypes, assignment, mixture, weights)
        loss: Tensor = TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            student, prototypes, assignment, mixture, weights
        )
        return loss

    def _suits(self, *tensors: Tensor) -> bool:
        dtype = tensors[0].dtype
        return dtype in self.dtypes and all(
            len(each) and each.dtype == dtype and each.shape[1] <= WIDEST for each in tensors
        )


class TiledCrossEntropy(torch.autograd.Function):
    """Sum over crops and rows of weighted cross-entropies to mixtures of assignments; see ``teacher.heads.cross_entropy``."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "crops rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        student, prototypes = student.contiguous(), prototypes.contiguous()
        crops, rows, width = student.shape
        targets = mixture.shape[1]
        log_total, mean = _merged(
            student.flatten(0, 1), prototypes, None, None, None, STUDENT_SHARPNESS
        )
        bottleneck = assignment.bottleneck.contiguous()
        log_rows = assignment.log_rows.contiguous()
        mass, target = _merged(
            bottleneck,
            assignment.prototypes.contiguous(),
            prototypes,
            log_rows,
            assignment.log_columns,
            1.0 / assignment.temperature,
        )
        pairs = -mixture.to(torch.float32)
        pull = (pairs @ target.view(targets, rows * width)).view(student.shape)
        mass = -pairs @ mass.view(targets, rows)
        log_total = log_total.view(crops, rows)
        gap = torch.addcmul(pull, mass[..., None], mean.view(student.shape))
        dot = (student * pull).sum(dim=-1)
        ctx.save_for_backward(student, prototypes, gap, pairs, weights, log_total, mass, log_rows)
        ctx.assignment, ctx.bottleneck = assignment, bottleneck
        return (torch.add(mass * log_total, dot, alpha=STUDENT_SHARPNESS) @ weights.float()).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, gap, pairs, weights, log_total, mass, log_rows = ctx.saved_tensors
        scale = weights.float() * (grads[0] * STUDENT_SHARPNESS)
        scaled = student * scale[:, None]
        pulls = (pairs.T @ scaled.flatten(1)).view(-1, student.shape[2]).to(student.dtype)
        assignment = ctx.assignment
        grad_prototypes = OPERATORS.scatter_tiles(
            *(prototypes, student.flatten(0, 1), -log_total.flatten(), (mass * scale).flatten()),
            *(assignment.prototypes.contiguous(), ctx.bottleneck, pulls),
            *(assignment.log_columns, log_rows, 1.0 / assignment.temperature),
        )
        grad_student = (gap * scale[:, None]).to(student.dtype)
        return grad_student, grad_prototypes, None, None, None


def _merged(
    rows: Tensor,
    keys: Tensor,
    values: Tensor | None,
    log_rows: Tensor | None,
    log_keys: Tensor | None,
    sharpness: float,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and mean value of each row; with ``log_rows`` the sums of weights and of values."""
    parts = OPERATORS.gather_tiles(rows, keys, values, log_rows, log_keys, sharpness, True)
    level, value = OPERATORS.merge_shares(*parts, log_rows is None, True)
    return level, value
