"""What reads files that others wrote: for each kind some whole files, and what the product does with one."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from distill.data.build_index import build_index
from distill.data.dataset_report import take_report
from distill.engine.node import ranks_on_node
from distill.engine.variables import is_launched, launched_rank
from distill.export.convert import convert
from distill.export.save import ExportFacts, write_backbone, write_heads
from distill.job.resolved_yaml import resolved_yaml
from distill.listing.document import builtin_recipes
from distill.plan.job import check_job
from distill.recipe.reader import load_job
from distill.runfolder.manifest import MANIFEST, find_latest
from distill.runfolder.tensor_file import SUFFIX, read_tensors
from distill.weights.heads import load_heads
from distill.weights.inspect import inspect
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape, ViTSpec
from tests.chaos import saves
from tests.chaos.mutations import (
    bytes_damaged,
    json_text_damaged,
    safetensors_damaged,
    tar_damaged,
    text_damaged,
)

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Target:
    """A kind of file. ``damage`` puts a damaged one into the folder of the case; ``read`` reads it as the product does."""

    name: str
    damage: Callable[[Path, Random], Path]
    read: Callable[[Path], object]


def targets(scratch: Path) -> list[Target]:
    """All targets, with their whole files in a scratch folder."""
    return [
        recipe_target(),
        weights_target(scratch / "weights"),
        manifest_target(scratch / "checkpoints"),
        tar_target(scratch / "tar"),
        variables_target(),
    ]


def recipe_target() -> Target:
    texts = {path.name: path.read_text() for path in builtin_recipes().values()}

    def damage(folder: Path, draw: Random) -> Path:
        for name, text in texts.items():
            (folder / name).write_text(text)
        chosen = folder / draw.choice(sorted(texts))
        chosen.write_bytes(text_damaged(texts[chosen.name], list(texts.values()), draw))
        return chosen

    def read(path: Path) -> None:
        recipe, teacher = load_job(str(path))
        resolved_yaml(str(path), [], recipe)
        check_job(recipe, teacher, 4, has_files=False)

    return Target("recipe", damage, read)


def variables_target() -> Target:
    """Variables of another launcher, in a file as an environment that a process is given."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    names += ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    usual = dict(
        zip(names, ("1", "16", "gpu01", "29500", "1", "8", "8(x2)", "8", "8"), strict=True)
    )

    def damage(folder: Path, draw: Random) -> Path:
        values = {name: text for name, text in usual.items() if draw.random() < 0.8}
        for name in draw.sample(sorted(values), draw.randint(0, min(3, len(values)))):
            texts = list(usual.values())
            values[name] = draw.choice(
                (
                    draw.choice(("", "0", "-1", "1.5", "0x1f", "1e3", "16", "٣", " 1", "9" * 5000)),
                    draw.choice(
                        ("http://a:1", "::1", "..", "a" * 70, "a\nb", "\x1b]52;c;x\x07", "é")
                    ),
                    text_damaged(values[name], texts, draw).decode("utf-8", "surrogateescape"),
                    str(draw.randint(0, 2**70)),
                )
            ).replace("\0", "")
        file = folder / "variables.json"
        file.write_text(json.dumps(values))
        return file

    def read(path: Path) -> None:
        environment = json.loads(path.read_text())
        if is_launched(environment):
            here = launched_rank(environment, "distill train my.yaml")
            assert 0 <= here.rank < here.num_ranks and 0 < here.port < 2**16, here
        ranks_on_node(environment)

    return Target("variables", damage, read)


def weights_target(folder: Path) -> Target:
    specs: list[BackboneSpec] = [
        ViTSpec(16, 1, 2, 64, 8, "mlp", layerscale_init=1e-5),
        ViTSpec(16, 1, 2, 64, 8, "swiglu", layerscale_init=1e-5),
        ConvNeXtSpec((1, 1, 1), (8, 12, 16), layerscale_init=1e-6),
    ]
    for number, spec in enumerate(specs):
        backbone = spec.build()
        spec.init_(backbone, torch.Generator().manual_seed(number))
        facts = ExportFacts(32, MEAN, STD, {"recipe": "tiny"})
        write_backbone(folder / f"hf{number}", backbone.state_dict(), spec, facts)
    generator = torch.Generator().manual_seed(0)
    heads = {name: Head(HeadShape(16, 8, 4, 6)) for name in ("dino_head", "ibot_head")}
    for head in heads.values():
        init_head_(head, generator)
    named = {f"{n}.{k}": v for n, head in heads.items() for k, v in head.state_dict().items()}
    write_heads(folder / "heads.safetensors", named)
    convert(folder / "hf0", folder / "meta.pth", layout="meta", dtype=None)

    def damage(case: Path, draw: Random) -> Path:
        kind = draw.choice(["hf0", "hf1", "hf2", "hf0", "heads.safetensors", "meta.pth", "config"])
        if kind == "heads.safetensors":
            data = (folder / kind).read_bytes()
            (case / kind).write_bytes(safetensors_damaged(data, draw))
        elif kind == "meta.pth":
            (case / kind).write_bytes(bytes_damaged((folder / kind).read_bytes(), draw))
        else:
            source = kind if kind != "config" else draw.choice(["hf0", "hf1", "hf2"])
            shutil.copytree(folder / source, case / kind)
            if kind == "config":
                file = case / kind / "config.json"
                file.write_bytes(json_text_damaged(file.read_text(), draw))
            else:
                file = case / kind / "model.safetensors"
                file.write_bytes(safetensors_damaged(file.read_bytes(), draw))
        return case / kind

    def read(path: Path) -> None:
        inspect(path, check_values=True)
        if path.name == "heads.safetensors":
            load_heads(path, 16)
        else:
            load_backbone(path)

    return Target("weights", damage, read)


def manifest_target(folder: Path) -> Target:
    for step in (10, 20):
        saves.save(folder, step)

    def damage(case: Path, draw: Random) -> Path:
        copy = case / "checkpoints"
        shutil.copytree(folder, copy)
        for path in draw.choice(([20], [20], [10, 20])):
            file = copy / f"{saves.PHASE}-{path:07d}" / MANIFEST
            data = json_text_damaged(file.read_text(), draw)
            file.write_bytes(signed(data) if draw.random() < 0.5 else data)
        return copy

    def read(path: Path) -> None:
        found = find_latest(path, saves.HASH, lambda _: None)
        if found is not None:
            for name in found[1].files:
                if name.endswith(SUFFIX):
                    read_tensors(found[0] / name)

    return Target("manifest", damage, read)


def signed(data: bytes) -> bytes:
    """A manifest with a checksum that is right, as somebody hostile would write it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(value, dict):
        return data
    value["checksum"] = ""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    value["checksum"] = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass")


def tar_target(folder: Path) -> Target:
    folder.mkdir()
    kinds = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    for name, kind in kinds.items():
        with tarfile.open(folder / f"{name}.tar", "w", format=kind) as archive:
            for number in range(3):
                prefix = "long/" * 30 if number == 2 else "class/"
                add(archive, f"{prefix}{number}.png", picture(number))
                add(archive, f"{prefix}{number}.cls", str(number % 2).encode())
            link = tarfile.TarInfo("class/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)

    def damage(case: Path, draw: Random) -> Path:
        name = f"{draw.choice(sorted(kinds))}.tar"
        (case / name).write_bytes(tar_damaged((folder / name).read_bytes(), draw))
        return case / name

    def read(path: Path) -> None:
        take_report([path], max_megapixels=64.0, progress=lambda *_: None)
        build_index([path], max_bad_fraction=1.0)

    return Target("tar", damage, read)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def settle() -> None:
    """One thread, so that a case costs the same everywhere."""
    torch.set_num_threads(1)
