"""What people call a network: its name on the Hugging Face Hub, its recipe, its folder or file."""

import re
from pathlib import Path

from distill.export.card import DISTILLATION
from distill.export.licences import CONFIG, folder_of, record_in
from distill.weights.containers import read_object
from distill.weights.inspect import RELEASED

HUB_CACHE = re.compile(r"^models--([\w.-]+?)--([\w.-]+)$")  # a folder of Hugging Face's cache
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
RELEASED_FILE = re.compile(r"(dinov3_\w+_pretrain_\w+)-([0-9a-f]{8})\.pth")


def teacher_name(weights: Path) -> str:
    """Returns what people call a teacher: its name on the Hub, its recipe where distill pretrained it, its folder or file."""
    hub = base_model(weights)
    record = record_in(folder_of(weights))
    if record.get("method") == DISTILLATION or "teacher_fingerprint" in record:
        folder = folder_of(weights) or weights
        return f"{folder.name} of {record.get('recipe', 'unknown')}"
    return hub or str(record.get("recipe") or weights.name or weights.absolute().name)


def base_model(weights: Path, sha256: str = "") -> str:
    """The name on the Hugging Face Hub of a network that was not trained here; empty where nothing shows one.

    Its folder in the Hub's cache has the name, ``config.json`` may; a released ``.pth`` has its checksum.
    """
    for part in reversed(weights.absolute().parts):
        cached = HUB_CACHE.match(part)
        if cached is not None:
            return f"{cached[1]}/{cached[2]}"
    released = RELEASED_FILE.fullmatch(weights.name)
    if released is not None and released[2] in RELEASED and sha256.startswith(released[2]):
        return f"facebook/{released[1].replace('_', '-')}"
    folder = folder_of(weights)
    config = folder / CONFIG if folder is not None else None
    name = (
        "" if config is None or not config.is_file() else read_object(config).get("_name_or_path")
    )
    is_name = isinstance(name, str) and HUB_NAME.fullmatch(name) and not Path(name).exists()
    return str(name) if is_name else ""
