"""Real photographs without a download: those inside the scikit-image wheel, cut into tiles.

    tiles/train/<photograph>/r03c05.png     tiles/held_out/<photograph>/r03c06.png

The split is a checkerboard: neighbours of a held-out tile were trained on, the tile itself never.
"""

import json
from pathlib import Path

from PIL import Image

from distill.runfolder.files import replaced

NAMES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "horse": "horse.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
}


def photograph_paths() -> dict[str, Path]:
    """Where the photographs lie in the installed package."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {name: folder / file for name, file in NAMES.items()}


def write_tiles(folder: Path, tile: int = 64) -> tuple[Path, Path]:
    """Cuts the photographs once into ``tile``-pixel RGB tiles; returns the folders to train on and to hold out.

    A folder that exists is complete and is used as it is.
    """
    facts = {"tile": tile, "photographs": sorted(NAMES)}
    listing = folder / "tiles.json"
    if not listing.is_file() or json.loads(listing.read_text()) != facts:
        with replaced(folder) as aside:
            for name, path in photograph_paths().items():
                _cut(path, name, aside, tile)
            (aside / "tiles.json").write_text(json.dumps(facts))
    return folder / "train", folder / "held_out"


def _cut(path: Path, name: str, folder: Path, tile: int) -> None:
    with Image.open(path) as opened:
        photograph = opened.convert("RGB")
    for part in ("train", "held_out"):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
    for row in range(photograph.height // tile):
        for column in range(photograph.width // tile):
            part = "train" if (row + column) % 2 == 0 else "held_out"
            box = (column * tile, row * tile, (column + 1) * tile, (row + 1) * tile)
            photograph.crop(box).save(
                folder / part / name / f"r{row:02}c{column:02}.png", icc_profile=None
            )
