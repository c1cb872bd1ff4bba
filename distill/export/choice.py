"""What the command line asks of an export, and what of it does not fit together."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distill.errors import RecipeError, SetupError
from distill.export.export import Dtype
from distill.export.exporter import Exporter
from distill.export.heads import FORMS, HEAD_KINDS
from distill.export.int8 import require_quantiser
from distill.export.onnx import require_exporter
from distill.listing.extensions import ExtensionKind, find
from distill.weights.custom_folders import factory_of

CUSTOM_FORMS = ("onnx", "factory")  # of custom students; formats of other packages may take any
BUILTIN_FORMS = ("hf", "timm", "meta", "onnx")  # of the networks that come with distill


@dataclass(frozen=True)
class Choice:
    """What the command line asks for.

    Args:
        to: a format; None for all that take a classifier.
        head: the classifier; None for the network alone.
        labels: the labelled images that it is fitted on.
        protocol: of its score.
        has_int8: whether a graph is quantised, too.
        calibrate: images for that; None for those of the run.
        dtype: number format of the weights.
    """

    to: str | None
    head: str | None = None
    labels: Path | None = None
    protocol: str = "quick"
    has_int8: bool = False
    calibrate: Path | None = None
    dtype: Dtype = "fp32"

    def require(self) -> str:
        """Refuses what does not fit together, before anything is read or written.

        Returns:
            What to call the formats.

        Raises:
            RecipeError: an option lacks another, or excludes it.
            SetupError: a library is missing.
        """
        if self.head is not None:
            self._require_head(self.head)
            return "+".join(f"{form}-{self.head}" for form in self.forms)
        if self.to is None:
            raise RecipeError(
                "distill export: no --to", fix="Name one of hf, timm, meta, onnx, factory."
            )
        if self.labels is not None:
            raise RecipeError("--labels: --with-head is missing", fix="Add --with-head knn.")
        exporter: Exporter = find(ExtensionKind.EXPORTER, self.to, "--to")
        if self.calibrate is not None and not self.has_int8:
            raise RecipeError("--calibrate: --int8 is missing", fix="Add --int8.")
        if self.has_int8:
            if self.to != "onnx":
                raise RecipeError(f"--int8 with --to {self.to}: not there", fix="Use --to onnx.")
            self._require_fp32("--int8")
            require_quantiser()
        exporter.require()
        return self.to

    def require_room(self, folders: Mapping[str, Path]) -> None:
        """Refuses networks that a format has no form for, before anything is written. Runs no factory.

        Args:
            folders: of the networks, by name.

        Raises:
            RecipeError: a custom student is to be written in a published layout, or another network for a factory.
        """
        for name, folder in folders.items():
            factory = factory_of(folder)
            forms = CUSTOM_FORMS if factory else BUILTIN_FORMS
            others = BUILTIN_FORMS if factory else CUSTOM_FORMS
            for form in self.forms:
                if form in forms or form not in others:
                    continue
                kind = f"a custom student, made by {factory}" if factory else "no custom student"
                raise RecipeError(
                    f"--to {form}: {name} is {kind}",
                    fix=f"Use --to {', '.join(forms[:-1])} or {forms[-1]}, or leave it out by --student.",
                )

    @property
    def forms(self) -> tuple[str, ...]:
        """The formats that the classifier is written in."""
        return FORMS if self.to is None else (self.to,)

    def _require_head(self, head: str) -> None:
        if head not in HEAD_KINDS:
            raise RecipeError(
                f"--with-head {head}: not known", fix=f"Take {' or '.join(HEAD_KINDS)}."
            )
        if self.labels is None:
            fix = "Add --labels SRC: class folders, a table or shards with labels."
            raise RecipeError(f"--with-head {head}: --labels is missing", fix=fix)
        if self.has_int8:
            raise RecipeError("--int8 with --with-head: not there", fix="Leave one of them out.")
        if self.to not in (None, *FORMS):
            fix = f"Use --to {' or '.join(FORMS)}, or leave it out for both."
            raise RecipeError(f"--with-head with --to {self.to}: not there", fix=fix)
        self._require_fp32("--with-head")
        if "onnx" in self.forms:
            require_exporter()
            if importlib.util.find_spec("onnxruntime") is None:
                fix = 'pip install "distill-family[onnx]"'
                raise SetupError("--with-head: onnxruntime not installed", fix=fix)

    def _require_fp32(self, option: str) -> None:
        if self.dtype != "fp32":
            fix = "Leave one of them out."
            raise RecipeError(f"{option} with --dtype {self.dtype}: not there", fix=fix)
