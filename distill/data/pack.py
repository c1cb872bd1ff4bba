"""Images of any sources into WebDataset tar shards with an index beside them: few large files, opened at once.

    OUT/shard-000000.tar ...    NUMBER.jpg and, where there are classes, NUMBER.cls; val/NUMBER.jpg of what its folder holds out
    OUT/index/                  what ``distill.data.index`` maps into memory
    OUT/pack.json               what was packed, and what was left out

Encoded bytes are copied as they are. A shard appears under its name when it is complete, so the same
command goes on after a stop with the first one that is missing. The same sources give the same bytes.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from distill.data.bad_images import examine, name_format
from distill.data.build_index import build_index
from distill.errors import DataError
from distill.listing.locations import Reader
from distill.listing.passed_over import PassedOver
from distill.listing.sources import INDEX_FOLDER, Found, list_source
from distill.runfolder.files import make_folder, replace_text, replaced

FORMAT = 1
SUFFIX_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "DIB": "bmp"}


def pack(
    sources: Sequence[Path],
    out: Path,
    *,
    images_per_shard: int,
    max_megapixels: float,
    progress: Callable[[int, int], None],
    passed_over: PassedOver | None = None,
) -> dict[str, int]:
    """Packs sources into ``out``; the numbers of images packed and left out, and of shards.

    ``passed_over`` gets what the sources hold besides, which the index keeps.

    Raises:
        DataError: a source is missing or empty, or ``out`` holds something else.
    """
    passed = PassedOver() if passed_over is None else passed_over
    found = [each for source in sources for each in list_source(source, passed_over=passed)]
    facts = {
        "format": FORMAT,
        "sources": [str(source) for source in sources],
        "images": len(found),
        "images_per_shard": images_per_shard,
        "names": hashlib.sha256(
            "\0".join(str(f.location) for f in found).encode(errors="surrogateescape")
        ).hexdigest(),
    }
    _claim(out, facts)
    starts = range(0, len(found), images_per_shard)
    for position, start in enumerate(starts):
        path = out / f"shard-{position:06}.tar"
        part = found[start : start + images_per_shard]
        if not path.exists():
            _write_shard(path, part, start, max_megapixels)
        progress(start + len(part), len(found))
    index = build_index([out], max_bad_fraction=0.0, max_megapixels=max_megapixels, is_packing=True)
    replace(index, passed_over=passed).save(out / INDEX_FOLDER, relative_to=out)
    return {"images": len(index), "left_out": len(found) - len(index), "shards": len(starts)}


def _claim(out: Path, facts: dict[str, object]) -> None:
    """Notes what is packed here, or sees that it is the same as before."""
    note = out / "pack.json"
    if note.is_file():
        before = json.loads(note.read_text())
        changed = [key for key, value in facts.items() if before.get(key) != value]
        if changed:
            raise DataError(
                f"{out}: was packed from something else ({', '.join(changed)} differ)",
                fix="Choose another folder, or remove this one.",
            )
        return
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: holds other files", fix="Choose another folder.")
    make_folder(out)
    replace_text(note, json.dumps(facts, indent=2))


def _write_shard(path: Path, part: Sequence[Found], start: int, max_megapixels: float) -> None:
    """One shard, complete or not there. Images that cannot be used are left out, and a list of them lies beside it."""
    reader, left_out = Reader(), list[dict[str, str]]()
    with replaced(path) as aside:
        with tarfile.open(aside, mode="w", format=tarfile.USTAR_FORMAT) as shard:
            for position, each in enumerate(part, start):
                try:
                    encoded = reader.read(each.location)
                    header = examine(encoded, max_megapixels, is_full=True)
                except OSError as error:
                    header = error.strerror or str(error)
                if isinstance(header, str):
                    left_out.append({"sample": str(each.location), "reason": header})
                    continue
                name = f"{'val/' if each.is_held_out else ''}{position:09}"
                _add(shard, f"{name}.{SUFFIX_OF[name_format(encoded)]}", encoded.tobytes())
                if each.label:
                    _add(shard, f"{name}.cls", each.label.encode(errors="surrogateescape"))
        if left_out:
            lines = "".join(json.dumps(row) + "\n" for row in left_out)
            replace_text(path.with_suffix(".left_out.jsonl"), lines)


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time and no owner: the same images give the same bytes
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))
