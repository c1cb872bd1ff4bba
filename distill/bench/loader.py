"""Images per CPU-second of the loader, with and without local crops, beside Pillow doing the same work in the same run.

Pillow does it twice: with Pillow's blur, and with that of torchvision. Neither is charged for reading the files.

Blocks of both alternate, so a slow minute of a shared machine hits both. CPU time is that of all threads of this
process. Images are synthetic photographs, JPEGs of 500 x 375 px as in ImageNet, or those of the recipe.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from distill.bench.pillow_reference import Blur, cut
from distill.data.build_index import build_index
from distill.data.crops import CropSchedule
from distill.data.index import ImageIndex
from distill.job.to_data import build_feed, build_loader
from distill.plan.crop_sizes import crop_schedule
from distill.recipe.keys import FamilyRecipe, TeacherRecipe

NUM_SYNTHETIC = 64
SYNTHETIC_WH = (500, 375)
QUALITY = 90
BLOCKS = 5  # of each way; medians with the smallest and largest
WARMUP_STEPS = 3
SETTLE_S = 1.0  # until the loader has prepared what it prepares ahead
REFERENCES = {"pillow": Blur.BOXES, "torchvision": Blur.TAPS}


def measure_loader(
    recipe: FamilyRecipe | TeacherRecipe,
    *,
    images: int,
    index: ImageIndex | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Rates for ``images`` images per block; synthetic ones where ``index`` is None."""
    torch.set_num_threads(
        1
    )  # threads that wait for each other by spinning would be counted as work
    with tempfile.TemporaryDirectory() as folder:
        if index is None:
            write_synthetic(Path(folder), recipe.seed)
            index = build_index([Path(folder)], max_bad_fraction=0.0)
        with_locals = crop_schedule(recipe)
        without = CropSchedule.one(replace(with_locals.graph, num_local=0))
        cases = {"all crops": with_locals}
        if with_locals.graph.num_local:
            cases["global crops only"] = without
        rates = {
            name: _compare(recipe, index, crops, images, name, say) for name, crops in cases.items()
        }
    spec = with_locals.graph
    return {
        "crops": f"2 x {spec.global_size} + {spec.num_local} x {spec.local_size}",
        "images": "synthetic, 500 x 375 JPEG"
        if index.sources[0][0].startswith(folder)
        else "the recipe's",
        "decoder_threads": recipe.data.num_threads,
        "cases": rates,
    }


def _compare(
    recipe: FamilyRecipe | TeacherRecipe,
    index: ImageIndex,
    crops: CropSchedule,
    images: int,
    name: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    batch = recipe.schedule.batch
    steps = max(1, round(images / batch))
    stop_step = WARMUP_STEPS + BLOCKS * steps

    def feed_to(stop_step: int) -> Any:
        return build_feed(recipe, index, crops, None, lambda _: range(batch), stop_step)

    # far more steps than are taken, so that no block ends early for want of work ahead
    loader = build_loader(recipe, feed_to(2 * stop_step), crops, batch, torch.device("cpu"))
    reference = feed_to(stop_step)
    reference.start(WARMUP_STEPS)
    for step in range(WARMUP_STEPS):
        loader.fetch(step)
    time.sleep(SETTLE_S)
    blocks: dict[str, list[float]] = {name: [] for name in ("loader", "loader_wall", *REFERENCES)}
    for block in range(BLOCKS):
        say(f"{name}: block {block + 1} of {BLOCKS}")
        first = WARMUP_STEPS + block * steps
        started, cpu = time.perf_counter(), time.process_time()
        for step in range(first, first + steps):
            loader.fetch(step)
        blocks["loader_wall"].append(steps * batch / (time.perf_counter() - started))
        time.sleep(SETTLE_S)  # what is prepared ahead was so at the start too; it is counted once
        blocks["loader"].append(steps * batch / (time.process_time() - cpu))
        taken = [reference.take() for _ in range(steps)]
        for side, blur in REFERENCES.items():
            cpu = time.process_time()
            for prepared in taken:
                assert prepared is not None, "enough steps"
                for row, encoded in enumerate(prepared.encoded):
                    cut(encoded, prepared.parameters, row, crops.graph, blur)
            blocks[side].append(steps * batch / (time.process_time() - cpu))
    loader.close()
    reference.close()
    for side in REFERENCES:
        pairs = zip(blocks["loader"], blocks[side], strict=True)
        blocks[f"over_{side}"] = [ours / theirs for ours, theirs in pairs]
    return {side: _spread(values) for side, values in blocks.items()}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_synthetic(folder: Path, seed: int) -> None:
    """JPEGs that weigh about as much as photographs do: smooth shapes with texture."""
    rng = np.random.default_rng(seed)
    for index in range(NUM_SYNTHETIC):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        shapes = coarse.resize(SYNTHETIC_WH, Image.Resampling.BICUBIC)
        grain = rng.normal(0.0, 40.0, (SYNTHETIC_WH[1], SYNTHETIC_WH[0], 3))
        texture = Image.fromarray((128 + grain).clip(0, 255).astype(np.uint8))
        texture = texture.filter(ImageFilter.GaussianBlur(1.0))
        mixed = Image.blend(shapes, texture, 0.3)
        buffer = io.BytesIO()
        mixed.save(buffer, "JPEG", quality=QUALITY)
        (folder / f"{index:03}.jpg").write_bytes(buffer.getvalue())
