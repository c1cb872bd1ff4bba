import math

import pytest
import torch

from teacher import chunks as module
from teacher.chunks import sinkhorn


def oracle(logits: list[list[float]], temperature: float) -> list[list[float]]:
    """Sinkhorn-Knopp as a nested loop: columns to equal totals, rows to one, three times."""
    rows, columns = len(logits), len(logits[0])
    q = [[math.exp(logit / temperature) for logit in row] for row in logits]
    for _ in range(3):
        for k in range(columns):
            total = sum(q[n][k] for n in range(rows))
            for n in range(rows):
                q[n][k] /= total * columns
        for n in range(rows):
            total = sum(q[n])
            for k in range(columns):
                q[n][k] /= total * rows
    return [[value * rows for value in row] for row in q]


@pytest.mark.parametrize(("rows", "prototypes"), [(7, 5), (1, 4), (12, 3)])
def test_sinkhorn__equals_nested_loop(rows: int, prototypes: int) -> None:
    torch.manual_seed(0)
    bottleneck = torch.nn.functional.normalize(torch.randn(rows, 6, dtype=torch.float64), dim=1)
    weight = torch.randn(prototypes, 6, dtype=torch.float64)
    assignment = sinkhorn(bottleneck, weight, 0.07)
    expected = torch.tensor(oracle((bottleneck @ weight.T).tolist(), 0.07), dtype=torch.float64)
    torch.testing.assert_close(assignment.columns(0, prototypes), expected, rtol=1e-12, atol=1e-14)


def test_sinkhorn__does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    bottleneck, weight = (
        torch.randn(37, 6, dtype=torch.float64),
        torch.randn(9, 6, dtype=torch.float64),
    )
    whole = sinkhorn(bottleneck, weight, 0.1)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 5)
    torch.testing.assert_close(
        sinkhorn(bottleneck, weight, 0.1).log_columns, whole.log_columns, rtol=1e-13, atol=0
    )


def test_sinkhorn__survives_the_lowest_temperature_in_fp32() -> None:
    bottleneck = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    weight = torch.nn.functional.normalize(torch.randn(20, 8), dim=1) * 10
    assignment = sinkhorn(bottleneck, weight, 0.04)
    sums = assignment.columns(0, 20).sum(dim=1)
    torch.testing.assert_close(
        sums, torch.ones(50), rtol=1e-5, atol=0
    )  # exponents up to 250 in fp32
