"""The cost table: its FLOPs are those that clustering takes, and the table of the page is this function's."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.curation.costs import CurationCost, curation_cost
from distill.curation.hierarchy import Settings, build, default_levels, default_rounds
from distill.curation.rows import VectorsInMemory

PAGE = Path(__file__).parents[3] / "docs" / "curation.md"
VIT_S_FLOPS = 9.4e9  # of one image of 224 px


def cost(num_images: int, *, num_gpus: int = 8) -> CurationCost:
    return curation_cost(
        num_images, num_images // 10, width=384, flops_per_image=VIT_S_FLOPS, num_gpus=num_gpus
    )


def test_flops__are_those_of_a_hierarchy(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.nn.functional.normalize(torch.randn(1_500, 384, generator=random), dim=1)
    settings = Settings(default_levels(1_500, 150), rounds=default_rounds(1_500))
    with FlopCounterMode(display=False) as counter:
        build(VectorsInMemory(values), settings, tmp_path / "h")
    counted = cost(1_500).cluster_flops  # more: a fit ends where nothing changes any more
    assert 0.4 * counted < counter.get_total_flops() <= counted


def test_hours__shrink_with_gpus_and_memory_does_not() -> None:
    few, many = cost(10**8), cost(10**8, num_gpus=64)
    assert few.cluster_hours / 8 < many.cluster_hours < few.cluster_hours / 4  # the start is on one
    assert many.embed_hours == pytest.approx(few.embed_hours / 8)
    assert many.bytes_per_rank == few.bytes_per_rank


def row(num_images: int) -> str:
    """A line of the page's table."""
    found = cost(num_images, num_gpus=64)
    levels = " / ".join(f"{k:,}" for k in found.levels)
    numbers = (
        f"{found.embed_flops:.1e}",
        f"{found.cluster_flops:.1e}",
        f"{found.embedding_bytes / 1e9:,.1f}",
        f"{found.embed_hours:.2g}",
        f"{found.cluster_hours:.2g}",
        f"{found.bytes_per_rank / 1e9:,.1f}",
    )
    return f"| {num_images:,} | {levels} | {' | '.join(numbers)} |"


@pytest.mark.parametrize("num_images", [10**6, 10**8, 1_700_000_000, 17_000_000_000])
def test_page__has_the_costs_of_today(num_images: int) -> None:
    assert row(num_images) in PAGE.read_text(encoding="utf-8")
