"""Pretraining through all stages: against a plain loop without an engine, over ZeRO stages, precisions and layouts."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.data.build_index import build_index
from distill.data.depth import draw_active
from distill.data.mask_counts import mask_counts
from distill.data.masks import draw_masks
from distill.job.pretraining import refresh_steps
from distill.job.to_data import build_feed, build_loader
from distill.plan.crop_sizes import crop_schedule
from distill.plan.from_recipe import shape_of_recipe
from distill.recipe.keys import TeacherRecipe
from distill.recipe.reader import load_job
from distill.recipe.schedules import StageSpec
from distill.train import schedule
from students.student import build_network, seeded
from teacher.batch import CropBatch, normalise
from teacher.shapes import ViTSpec
from teacher.vit import ViT, rope_angles
from tests.support.pretraining import (
    GENTLE,
    pretrain,
    recipe_of,
    write_pretraining,
)
from tests.support.spawn import on_ranks
from tests.support.weights import folder_of, random_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pretraining(tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, ZeRO 1."""
    return on_ranks(1, pretrain, images, tmp_path_factory.mktemp("alone"))[0]


def test_pretraining__equals_a_plain_loop_without_an_engine(
    images: Path, alone: dict[str, Any]
) -> None:
    losses, ema = plain(recipe_of(images), images)
    assert alone["losses"] == pytest.approx(losses, rel=2e-5)  # fp32, twelve steps of AdamW
    for (
        name,
        tensor,
    ) in ema.items():  # AdamW turns rounding of a tiny gradient into parts of a step, 1e-3
        torch.testing.assert_close(alone["ema"][name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_pretraining__with_a_rope_box_for_every_block_equals_a_plain_loop(
    images: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    words = ("schedule.rope_draws=block",)
    found = on_ranks(1, pretrain, images, tmp_path, *words)[0]
    losses, _ = plain(recipe_of(images, *words), images)
    assert found["losses"] == pytest.approx(losses, rel=2e-5)
    assert found["losses"] != pytest.approx(alone["losses"], rel=1e-4)


@pytest.fixture(scope="module")
def two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes, ZeRO 1."""
    return on_ranks(2, pretrain, images, tmp_path_factory.mktemp("two"), *GENTLE)[0]


CLIP = 1e9  # of this tiny network the first norm is 2e8
UNCLIPPED = (*GENTLE, f"schedule.clip={CLIP}")


@pytest.fixture(scope="module")
def unclipped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes, ZeRO 1, gradients as they are."""
    found: dict[str, Any] = on_ranks(
        2, pretrain, images, tmp_path_factory.mktemp("unclipped"), *UNCLIPPED
    )[0]
    assert all(terms["grad_norm"] < CLIP for terms in found["terms"])
    return found


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_pretraining__zero_stages_give_the_same_bits(
    zero: int, images: Path, unclipped: dict[str, Any], tmp_path: Path
) -> None:
    """Two addends have one sum: without clipping nothing is left to be added in another order."""
    found = on_ranks(2, pretrain, images, tmp_path, f"engine.zero={zero}", *UNCLIPPED)[0]
    assert found["losses"] == unclipped["losses"]
    for name, tensor in unclipped["ema"].items():
        # measured 7e-12: the optimizer's vector loops end at other elements of a shard
        torch.testing.assert_close(found["ema"][name], tensor, rtol=0, atol=1e-9)
    if zero == 3:  # EMA and anchor are sharded; heads are not
        assert found["held"] < 0.8 * unclipped["held"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_pretraining__zero_stages_clip_alike(
    zero: int,
    images: Path,
    two: dict[str, Any],
    unclipped: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = on_ranks(2, pretrain, images, tmp_path, f"engine.zero={zero}", *GENTLE)[0]
    # ZeRO 3 sums the norm in another order: 2e-7 to 3e-6 over twelve steps, by instruction set
    assert found["losses"] == pytest.approx(two["losses"], rel=2e-5)
    assert unclipped["losses"] != pytest.approx(two["losses"], rel=1e-3)  # clipping is at work


@pytest.mark.slow  # a job of three ranks
def test_pretraining__layouts_give_nearly_the_same_losses(
    images: Path, two: dict[str, Any], tmp_path: Path
) -> None:
    words = ["engine.zero=3", "engine.activation_checkpointing=true", *GENTLE]
    three = on_ranks(3, pretrain, images, tmp_path, *words)[0]
    # fp32 sums in another order; measured 5e-6
    assert three["losses"] == pytest.approx(two["losses"], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_pretraining__bf16_follows_fp32(
    zero: int, images: Path, two: dict[str, Any], tmp_path: Path
) -> None:
    words = ["engine.precision=bf16", f"engine.zero={zero}", *GENTLE]
    found = on_ranks(2, pretrain, images, tmp_path, *words)[0]
    assert found["losses"] == pytest.approx(two["losses"], rel=3e-2)  # 8 bits of mantissa


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pretraining__one_block_of_the_7b(precision: str, images: Path, tmp_path: Path) -> None:
    # without bf16 instructions a core takes 44 s for one backward pass of the full width
    width = 4096 if precision == "fp32" else 2048
    shape = f"width: {width}, depth: 1, heads: {width // 128}, ffn: swiglu, ffn_width: {2 * width}"
    wide = f"model={{arch: vit, {shape}, patch: 16}}"
    stages = "stages=[{name: base, steps: 2}]"
    words = [
        wide,
        stages,
        "schedule.batch=2",
        "crops.local.count=0",
        "schedule.freeze_prototypes=0",
    ]
    words.append(f"engine.precision={precision}")
    found = on_ranks(1, pretrain, images, tmp_path, *words, timeout_s=600.0)[0]
    first, last = found["losses"]
    assert np.isfinite(first) and last < first


def test_pretraining__the_anchor_changes_only_at_its_refresh_steps(alone: dict[str, Any]) -> None:
    anchors = alone["anchors"]
    assert anchors[:4] == [{}] * 4
    changes = [not same(a, b) for a, b in pairwise(anchors[4:8])]
    assert changes == [True, False, False]  # refreshed after two steps, once
    assert all(same(anchors[8], later) for later in anchors[9:12])
    assert not same(anchors[7], anchors[8])  # the next stage has its own
    with_gram = ["gram" in terms for terms in alone["terms"]]
    assert with_gram == [False] * 4 + [True] * 8


@pytest.mark.parametrize("name", ["teacher_7b", "teacher_small", "quickstart_teacher"])
def test_refresh_steps__all_that_a_shipped_recipe_asks_for_act(name: str) -> None:
    recipe, _ = load_job(name)
    assert isinstance(recipe, TeacherRecipe)
    for stage in recipe.stages:
        steps = refresh_steps(stage)
        assert len(steps) == (stage.gram.max_refreshes if stage.gram else 0)
        assert all(step < stage.steps for step in steps)  # a later step looks at it
    if name == "teacher_7b":
        assert list(refresh_steps(recipe.stages[1])) == [10_000, 20_000, 30_000]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# The plain loop: full matrices, full blocks with flags, torch's own optimizer and clipping.


def plain(recipe: TeacherRecipe, images: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps and the last EMA, in one process."""
    shape = shape_of_recipe(recipe)
    assert shape.heads is not None
    online = nn.ModuleList(build_network(shape.spec, shape.heads, seeded(recipe.seed, "teacher")))
    ema = nn.ModuleList(build_network(shape.spec, shape.heads, seeded(recipe.seed, "teacher")))
    names = ["backbone", "dino_head", "ibot_head"]
    named = {
        f"{names[int(key.split('.')[0])]}.{key.partition('.')[2]}": p
        for key, p in online.named_parameters()
    }
    factor = schedule.lr_factors(recipe.schedule, shape.spec)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "name": name} for name, p in named.items()], lr=0.0, betas=(0.9, 0.99)
    )
    losses, snapshots = [], {}
    anchor: ViT | None = None
    for stage in recipe.stages:
        own = recipe.at_stage(stage)
        first = recipe.first_step(stage)
        if stage.gram is not None:
            anchor = cast(ViT, build_network(shape.spec, shape.heads, seeded(0, "x"))[0])
            anchor.load_state_dict(snapshots[stage.gram.teacher])
        for step, crops in batches(recipe, stage, images):
            loss = plain_loss(own, stage, step, crops, online, ema, anchor if stage.gram else None)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(named.values(), own.schedule.clip, error_if_nonfinite=True)
            start, length = (first, stage.steps) if stage.lr else (0, 12)
            lr = schedule.learning_rate(own.schedule.lr, step - start, length, own.schedule.batch)
            for group in optimizer.param_groups:
                name, ndim = group["name"], group["params"][0].ndim
                frozen = ".prototypes." in name and step < own.schedule.freeze_prototypes
                group["lr"] = 0.0 if frozen else lr * factor(name)
                is_decayed = ndim > 1 and not name.endswith(("_token", "_tokens"))
                group["weight_decay"] = own.schedule.weight_decay if is_decayed else 0.0
            optimizer.step()
            with torch.no_grad():
                for average, p in zip(ema.parameters(), online.parameters(), strict=True):
                    average.mul_(own.schedule.ema).add_(p, alpha=1.0 - own.schedule.ema)
            losses.append(loss.item())
            done = step - first + 1
            weights = {k: v.clone() for k, v in ema[0].state_dict().items()}
            snapshots[f"{stage.name}@{done}"] = weights
            gram = stage.gram
            if gram and done % gram.refresh == 0 and done // gram.refresh <= gram.max_refreshes:
                assert anchor is not None
                anchor.load_state_dict(weights)
    averages = dict(zip(named, ema.parameters(), strict=True))
    return losses, {name: tensor.detach() for name, tensor in averages.items()}


def batches(
    recipe: TeacherRecipe, stage: StageSpec, images: Path
) -> Iterator[tuple[int, CropBatch]]:
    index = build_index([images], max_bad_fraction=0.0)
    first, batch = recipe.first_step(stage), recipe.at_stage(stage).schedule.batch
    crops, stop = crop_schedule(recipe, stage), first + stage.steps
    feed = build_feed(recipe, index, crops, None, lambda _: range(batch), stop)
    loader = build_loader(recipe, feed, crops, batch, torch.device("cpu"))
    for step in range(first, stop):
        yield step, loader.fetch(step)
    loader.close()


def plain_loss(
    recipe: TeacherRecipe,
    stage: StageSpec,
    step: int,
    crops: CropBatch,
    online: nn.ModuleList,
    ema: nn.ModuleList,
    anchor: ViT | None,
) -> Tensor:
    data, settings, count = recipe.data, recipe.schedule, len(crops.global_crops)
    seen = SimpleNamespace(
        globals=normalise(crops.global_crops, data.mean, data.std, torch.float32),
        locals=normalise(crops.local_crops, data.mean, data.std, torch.float32),
    )
    side = seen.globals.shape[-1] // 8
    counts = mask_counts(
        seed=recipe.seed, step=step, images_global=count, grid_hw=(side, side),
        probability=recipe.masks.probability, ratio=recipe.masks.ratio,
    )  # fmt: skip
    masks = draw_masks(
        seed=recipe.seed, step=step, counts=counts, positions=np.arange(count), grid_hw=(side, side)
    )
    keep = 1.0 - settings.drop_path
    kept = draw_active(
        seed=recipe.seed,
        step=step,
        positions=range(count),
        num_crops=4,
        num_blocks=2,
        survival=keep,
    )
    temperature = schedule.teacher_temperature(settings, step)
    with torch.no_grad():
        taught = [ema[0](seen.globals[:, crop]) for crop in range(2)]
        dino = torch.cat([ema[1](each.class_token) for each in taught])
        p_dino = plain_sinkhorn(dino @ ema[1].prototypes.weight.T / temperature)
        rows = [(i, c) for i in range(count) for c in range(2) if counts[i, c]]
        ibot = torch.cat([ema[2](taught[c].patch_tokens[i][masks[i, c]]) for i, c in rows])
        p_ibot = plain_sinkhorn(ibot @ ema[2].prototypes.weight.T / temperature)
    blocks = 2 if settings.rope_draws == "block" else None
    drawn = schedule.rope_scales(settings.rope_rescale, recipe.seed, step, blocks)
    scales = [each if isinstance(each, tuple) else (each, each) for each in drawn]
    found = [
        plain_vit(online[0], seen.globals[:, c], masks[:, c], kept[:, c] / keep, scales[0])
        for c in range(2)
    ] + [
        plain_vit(online[0], seen.locals[:, c], None, kept[:, 2 + c] / keep, scales[1])
        for c in range(2)
    ]
    log_q = [
        F.log_softmax(online[1](cls) @ online[1].prototypes.weight.T / 0.1, dim=1)
        for cls, _ in found
    ]
    targets = p_dino.split(count)
    pairs = [(0, 1, 1.0), (1, 0, 1.0)]
    pairs += [(2 + c, t, stage.objective.local) for c in range(2) for t in range(2)]
    loss = sum(
        -weight * (targets[t] * log_q[s]).sum(1).mean() / len(pairs) for s, t, weight in pairs
    )
    start = 0
    for i, c in rows:
        patches = found[c][1][i][masks[i, c]]
        log_p = F.log_softmax(online[2](patches) @ online[2].prototypes.weight.T / 0.1, dim=1)
        target = p_ibot[start : start + len(patches)]
        start += len(patches)
        loss = loss - (target * log_p).sum(1).mean() / (2 * count)
    for c in range(2):
        unit = F.normalize(found[c][0], dim=1)
        for i in range(count):
            others = [j for j in range(count) if j != i and j // 16 == i // 16]
            nearest = max(others, key=lambda j: float((unit[i] @ unit[j]).detach()))
            gap = torch.linalg.vector_norm(unit[i] - unit[nearest] + 1e-8)
            loss = loss - stage.objective.koleo * (gap + 1e-8).log() / count
    if anchor is not None and stage.gram is not None:
        assert crops.anchor_crops is not None
        larger = normalise(crops.anchor_crops, data.mean, data.std, torch.float32)
        for c in range(2):
            with torch.no_grad():
                features = anchor(larger[:, c])
                square = features.patch_tokens.transpose(1, 2).unflatten(2, features.grid_hw)
                reference = F.interpolate(square, (side, side), mode="bicubic").flatten(2)
            mine, theirs = (F.normalize(x, dim=2) for x in (found[c][1], reference.transpose(1, 2)))
            difference = mine @ mine.transpose(1, 2) - theirs @ theirs.transpose(1, 2)
            loss = loss + stage.gram.weight * difference.square().mean() / 2
    return torch.as_tensor(loss)


def plain_sinkhorn(logits: Tensor) -> Tensor:
    weights = (logits - logits.max()).double().exp()
    for _ in range(3):
        weights = weights / weights.sum(dim=0, keepdim=True)
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights.float()


def plain_vit(
    vit: nn.Module,
    pixels: Tensor,
    masks: Tensor | None,
    kept: Tensor,
    scales: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Class and patch tokens; every branch is computed for every row and multiplied by its flag."""
    assert isinstance(vit, ViT)
    side = pixels.shape[-1] // 8
    tokens = vit.embeddings(pixels, masks)
    for number, block in enumerate(vit.layer):
        flags = kept[:, number].float()[:, :, None, None]  # [images, 2, 1, 1]
        angles = rope_angles((side, side), 16, scales[number], pixels.device)
        branch = block.layer_scale1(block.attention(block.norm1(tokens), angles))
        tokens = tokens + flags[:, 0] * branch
        tokens = tokens + flags[:, 1] * block.layer_scale2(block.mlp(block.norm2(tokens)))
    normed = vit.norm(tokens)
    return normed[:, 0], normed[:, 5:]


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_pretraining__starts_from_weights_and_is_anchored_to_them(
    zero: int, images: Path, tmp_path: Path
) -> None:
    """While the backbone is frozen it is the source, bit for bit, in the average and in the anchor; heads learn."""
    spec = ViTSpec(32, 2, 2, 128, patch=8)
    folder_of(tmp_path / "source", spec)
    source = random_weights(spec)
    words = [
        f"model.init={{from: '{tmp_path / 'source'}', freeze_backbone: 3}}",
        "stages=[{name: base, steps: 3, gram: {teacher: init, max_refreshes: 0}}]",
        f"engine.zero={zero}",
    ]
    found = on_ranks(2, pretrain, images, tmp_path, *words)[0]
    assert np.isfinite(found["losses"]).all()
    for name, tensor in source.items():
        assert torch.equal(found["ema"][f"backbone.{name}"], tensor), name
        assert torch.equal(found["anchors"][-1][name], tensor), name
    shape = shape_of_recipe(recipe_of(images))
    assert shape.heads is not None
    fresh = build_network(spec, shape.heads, seeded(0, "teacher"))[1].state_dict()["mlp.0.weight"]
    assert not torch.equal(found["ema"]["dino_head.mlp.0.weight"], fresh)
    if zero == 3:  # from the step on where the backbone learns, too, it moves
        words[0] = words[0].replace("freeze_backbone: 3", "freeze_backbone: 2")
        moved = on_ranks(2, pretrain, images, tmp_path, *words)[0]
        name = "layer.0.mlp.up_proj.weight"
        assert moved["losses"][:2] == found["losses"][:2]
        assert not torch.equal(moved["ema"][f"backbone.{name}"], source[name])
