"""One network written in the format of another library, proven, and only then given its name.

    .NAME.part   written here: weights in the wanted layout and dtype
    verification        the other library reads them; its features are compared with ours (distill.export.verify)
    NAME         after the verification, with README.md and distill.json; NAME.rejected when it fails

A folder with its final name has therefore been verified, or README.md and distill.json hold the reason why
it was not. What each format holds:

    hf    config.json, model.safetensors, preprocessor_config.json
    timm  the same two names in timm's layout
    meta  NAME-<8 hex digits of its sha256>.pth, as the published files are named
    onnx  model.onnx with free batch, height and width
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from distill.errors import CheckpointError, UserError
from distill.export.card import (
    Background,
    Form,
    Inputs,
    WrittenFile,
    distill_usage,
    model_card,
    read_inputs,
)
from distill.export.exporter import Exporter, Measured
from distill.export.licences import CARD, CONFIG, RECORD, record_in, write_licences
from distill.export.save import sha256_of
from distill.export.verify import TOLERANCE, Parity, verify
from distill.runfolder.files import folder_while, remove, rename, replaced
from distill.weights.containers import read_object
from distill.weights.hf_config import preprocessor_config
from distill.weights.load import load_backbone
from distill.weights.stated_inputs import PREPARATION
from students.shapes import BackboneSpec

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """A finished folder."""

    name: str
    folder: Path
    parity: Parity
    files: tuple[WrittenFile, ...]
    measured: Measured = field(default_factory=Measured)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "bytes": self.num_bytes,
            **self.parity.to_json(),
            **self.measured.record,
        }


def export_network(
    name: str,
    source: Path,
    folder: Path,
    exporter: Exporter,
    dtype: Dtype,
    background: Background,
    inputs: Inputs,
) -> Exported:
    """Writes the network in ``source`` to ``folder`` in a format and verifies that it gives the same features.

    An earlier export under that name is replaced once the new one has passed.

    Raises:
        UserError: the features differ; what was written is then named ``folder``.rejected.
        CheckpointError: ``folder`` holds something else, or ``source`` cannot be read.
        SetupError: a library is missing to write this format.
    """
    _refuse_foreign(folder, source)
    rejected = folder.with_name(f"{folder.name}.rejected")
    remove(rejected)
    with folder_while(folder.parent), replaced(folder) as aside:
        exporter.write(name, source, aside, DTYPES[dtype])
        _write_preparation(source, aside, inputs)
        write_licences(aside, background.licences)
        exporter.attach(aside, background.licences.metadata())
        parity = verify(exporter, aside, source, DTYPES[dtype])
        if parity.is_mismatch:
            rename(aside, rejected)
            raise _mismatch(name, exporter.name, parity, rejected)
        measured = exporter.measure(aside)
        files = tuple(
            _measure(path) for path in sorted(aside.iterdir()) if path.name not in (CARD, RECORD)
        )
        exported = Exported(name, folder, parity, files, measured)
        _describe(exported, source, aside, exporter, dtype, background)
    return exported


def _write_preparation(source: Path, aside: Path, inputs: Inputs) -> None:
    """``preprocessor_config.json`` for every format: that of the network, or that of its run."""
    source_file = source / PREPARATION
    config = (
        read_object(source_file)
        if source_file.is_file()
        else preprocessor_config(inputs.size, inputs.mean, inputs.std)
    )
    _write_json(aside / PREPARATION, config)


def _describe(
    exported: Exported,
    source: Path,
    aside: Path,
    exporter: Exporter,
    dtype: Dtype,
    background: Background,
) -> None:
    """Writes the card and the record; what the source's record holds is kept in it."""
    spec, name = load_backbone(source)[1], exported.name
    parity, files = exported.parity, exported.files
    inputs = read_inputs(aside / PREPARATION)
    beside = {*background.licences.texts, PREPARATION, CONFIG}
    size = sum(file.num_bytes for file in files if file.name not in beside)
    blocks = _blocks(name, spec, exporter, files)
    measured = exported.measured
    section = (measured.title, (*measured.lines, *measured.warnings))
    sections = (section,) if measured.title else ()
    form = Form(exporter.library, dtype, size, blocks, parity.describe(), files, sections)
    (aside / CARD).write_text(model_card(name, spec, inputs, background, form), encoding="utf-8")
    record = {
        **background.record,
        "licences": background.licences.to_json(),
        "export": {
            "format": exporter.name,
            "dtype": dtype,
            **parity.to_json(),
            **measured.record,
        },
        "files": {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in files},
    }
    _write_json(aside / RECORD, record)


def _blocks(
    name: str, spec: BackboneSpec, exporter: Exporter, files: tuple[WrittenFile, ...]
) -> list[tuple[str, list[str], bool]]:
    """Code that loads the folder: the library's, and ours where we read the format."""
    names = [file.name for file in files]
    lines = exporter.usage(name, spec, names)
    theirs = (f"With {exporter.library}:", lines, True)
    if exporter.reader is None:
        ours = [each for each in names if each.endswith(".pth")]
        without = f"With the code of {exporter.library}, which is no package to install:"
        blocks = [("With distill:", distill_usage(spec, weights), True) for weights in ours]
        return [*blocks, (without, lines, False)]
    if exporter.name == "hf":
        return [theirs, ("With distill:", distill_usage(spec), True)]
    return [theirs]


def _mismatch(name: str, form: str, parity: Parity, rejected: Path) -> UserError:
    return UserError(
        f"{name} as {form}: {parity.describe()}; at most {TOLERANCE:g} is allowed",
        fix=f"Do not use {rejected}; try another format, and report this line with both versions.",
    )


def _refuse_foreign(folder: Path, source: Path) -> None:
    """Only what an earlier export wrote is replaced, and never the network itself."""
    if folder.resolve() == source.resolve():
        raise CheckpointError(
            f"{folder}: is the network to export itself", fix="Give another --out."
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if "export" not in record_in(folder):
        raise CheckpointError(
            f"{folder}: exists and is no export of distill", fix="Give another --out."
        )


def _measure(path: Path) -> WrittenFile:
    return WrittenFile(path.name, path.stat().st_size, sha256_of(path))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
