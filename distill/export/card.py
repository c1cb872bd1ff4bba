"""The README.md of a folder: what the network is, how it was trained, its licences, its scores, how to load it.

Only what is known is written, and what is not is called unknown. The card lies beside the weights from the
first export on; scores are added when there are some. It is made from ``distill.json``, the licences, the
run's ``summary.json`` and the numbers of ``preprocessor_config.json``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.export.licences import Licences
from distill.runfolder.status import KNN_K, TEACHER
from distill.weights.containers import read_object
from students.shapes import BackboneSpec

KEEP_MARK = (
    "<!-- written by distill eval and train; without this line they leave the file alone -->"
)
DISTILLATION, PRETRAINING = "distillation", "pretraining"
METHODS = {
    DISTILLATION: (
        "Distilled from a frozen teacher: what the teacher makes of each image is what this network "
        "learned to predict, without labels."
    ),
    PRETRAINING: (
        "Trained by self-supervised pretraining: without labels, its targets come from an average of its "
        "weights over time."
    ),
    "": "Not trained by distill, or by a version that did not note how: see the card that came with it.",
}
TRAINED_HERE = " The weights are the exponential moving average (EMA) of training."
TAGS = {DISTILLATION: "knowledge-distillation", PRETRAINING: "self-supervised-learning"}
PLAIN = re.compile(r"(?!(?i:true|false|yes|no|on|off|null|y|n)$)[A-Za-z][\w.-]*")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Inputs:
    """Side of an image in pixels and its normalisation, as in ``preprocessor_config.json``."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Background:
    """Where a network comes from: its ``distill.json``, its licences, the ``summary.json`` of its run."""

    record: Mapping[str, Any]
    licences: Licences
    scores: Mapping[str, Any]


@dataclass(frozen=True)
class WrittenFile:
    """One file of the folder."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Form:
    """How a folder holds its network.

    ``blocks``: what stands above each block of code, the lines that go on from ``folder`` and ``pixels``, and
    whether packages to install suffice to run them;
    ``checked``: how the files were verified, empty where that is not needed;
    ``sections``: further ones, by title, a line each.
    """

    library: str
    dtype: str
    num_bytes: int
    blocks: Sequence[tuple[str, Sequence[str], bool]]
    checked: str = ""
    files: tuple[WrittenFile, ...] = ()
    sections: Sequence[tuple[str, Sequence[str]]] = ()


def method_of(record: Mapping[str, Any]) -> str:
    """Returns how distill trained a network; empty for one from elsewhere. 0.1.0 noted a teacher's fingerprint only."""
    old = PRETRAINING if "recipe_hash" in record else ""
    return str(record.get("method", DISTILLATION if "teacher_fingerprint" in record else old))


def transformers_usage(
    name: str,  # noqa: ARG001  # as every exporter's
    spec: BackboneSpec,
    files: Sequence[str],  # noqa: ARG001
) -> list[str]:
    """Lines of Python that load a Hugging Face folder by transformers."""
    return [
        "from transformers import AutoModel",
        "",
        "backbone = AutoModel.from_pretrained(folder).eval()",
        "with torch.no_grad():",
        "    found = backbone(pixel_values=pixels)",
        "class_feature = found.pooler_output  # [images, width]",
        f"num_patches = (pixels.shape[2] // {spec.stride}) * (pixels.shape[3] // {spec.stride})",
        "patch_features = found.last_hidden_state[:, -num_patches:]  # [images, patches, width]",
    ]


def distill_usage(spec: BackboneSpec, path: str = "") -> list[str]:
    """Lines of Python that load a folder, or the file ``path`` in it, by distill."""
    file = f' / "{path}"' if path else ""
    given = f", spec={spec.probe_call}" if spec.probe_call else ""
    return [
        "from pathlib import Path",
        "from distill.weights.load import load_backbone",
        *(["from students.custom import probe"] if spec.probe_call else []),
        "",
        f"backbone, _ = load_backbone(Path(folder){file}{given})",
        "with torch.no_grad():",
        "    found = backbone(pixels)",
        "class_feature, patch_features = found.class_token, found.patch_tokens",
    ]


def folder_form(name: str, spec: BackboneSpec, num_bytes: int) -> Form:
    """The form of a student's or teacher's folder in a run: Hugging Face, fp32; a custom network is distill's only."""
    ours = ("With distill:", distill_usage(spec), True)
    if spec.probe_call:
        return Form("distill", "fp32", num_bytes, [ours])
    lines = transformers_usage(name, spec, [])
    theirs = ("With transformers (`pip install transformers`):", lines, True)
    return Form("transformers", "fp32", num_bytes, [theirs, ours])


def model_card(
    name: str, spec: BackboneSpec, inputs: Inputs, background: Background, form: Form
) -> str:
    """The text of README.md."""
    record, method = background.record, method_of(background.record)
    return "\n".join(
        [
            "---",
            *_front_matter(background, form),
            "---",
            "",
            *(() if form.files else (KEEP_MARK, "")),
            f"# {name}",
            "",
            "Vision backbone that gives one class feature and one feature per patch of an image.",
            "",
            "## How it was trained",
            "",
            METHODS.get(method, METHODS[""]) + (TRAINED_HERE if method else ""),
            "",
            *(f"- {fact}" for fact in (*_origin(record, method), *_shape(spec, inputs, form))),
            "",
            "## Licence",
            "",
            *_licence(background.licences),
            "",
            "## Load it",
            "",
            *_code(name, inputs, form),
            *_sections(form),
            "## Scores",
            "",
            *_scores(name, background.scores),
            *_files(form.files),
            "",
        ]
    )


def read_inputs(path: Path) -> Inputs:
    """What a ``preprocessor_config.json`` states; a number that it lacks is ImageNet's, or 224 px."""
    held = read_object(path)
    size = held.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge", 224))
    mean, std = (
        held.get("image_mean", [0.485, 0.456, 0.406]),
        held.get("image_std", [0.229, 0.224, 0.225]),
    )
    return Inputs(int(size), (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _front_matter(background: Background, form: Form) -> list[str]:
    """YAML as Hugging Face reads it; what is not a plain word is written as JSON, which YAML contains."""
    record, method = background.record, method_of(background.record)
    tags = ["vision", "feature-extraction", *([TAGS[method]] if method in TAGS else [])]
    base = str(record.get("base_model", ""))
    values = {
        "library_name": form.library,
        "pipeline_tag": "image-feature-extraction",
        **background.licences.front_matter(),
        **({"base_model": base} if HUB_ID.fullmatch(base) else {}),
    }
    texts = {k: v if PLAIN.fullmatch(v) else json.dumps(v) for k, v in values.items()}
    return [f"{key}: {text}" for key, text in texts.items()] + [
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]


def _origin(record: Mapping[str, Any], method: str) -> list[str]:
    """Teacher, data, recipe and steps, as far as they are noted."""
    if not method:
        return []
    names, images = record.get("sources"), record.get("images")
    count = f"{images:,} images" if isinstance(images, int) else "unknown number of images"
    data = f"{count} from {', '.join(names)}" if isinstance(names, list) else count
    return [
        *([f"teacher: {_teacher(record)}"] if method == DISTILLATION else []),
        *([f"started from: {_start(record)}"] if isinstance(record.get("init"), dict) else []),
        f"data: {data} (fingerprint {_known(record, 'data')})",
        f"recipe: {_known(record, 'recipe')} (hash {_known(record, 'recipe_hash')}, "
        f"{_known(record, 'steps')} steps)",
        *([f"parked {record['parked']}"] if "parked" in record else []),
    ]


def _start(record: Mapping[str, Any]) -> str:
    """The weights that training began with."""
    init = record["init"]
    return f"{_known(init, 'name')} (sha256 of its weights {_known(init, 'sha256')})"


def _teacher(record: Mapping[str, Any]) -> str:
    """The teacher in one line, and what it was distilled from in turn."""
    held = record.get("teacher")
    teacher = held if isinstance(held, dict) else {}
    facts = [
        *([str(teacher["arch"])] if teacher.get("arch") else []),
        *([f"{teacher['parameters']:,} parameters"] if teacher.get("parameters") else []),
        *([f"sha256 of its weights {teacher['sha256']}"] if teacher.get("sha256") else []),
        f"fingerprint {record.get('teacher_fingerprint', 'unknown')}",
    ]
    further = f"; itself distilled from {_chain(teacher)}" if teacher.get("teacher") else ""
    return f"{teacher.get('name', 'unknown')} ({', '.join(facts)}){further}"


def _chain(teacher: Mapping[str, Any]) -> str:
    """Names of the teachers of a teacher."""
    names, held = [], teacher.get("teacher")
    while isinstance(held, dict):
        names.append(str(held.get("name", "unknown")))
        held = held.get("teacher")
    return ", that from ".join(names)


def _shape(spec: BackboneSpec, inputs: Inputs, form: Form) -> list[str]:
    mean, std = (", ".join(f"{value:g}" for value in each) for each in (inputs.mean, inputs.std))
    return [
        f"weights: {form.dtype}, {spec.exported.parameters:,} parameters, {_size(form.num_bytes)}",
        f"input: RGB images in [0, 1], {inputs.size} x {inputs.size} pixels, minus mean ({mean}), divided "
        f"by standard deviation ({std}), as in `preprocessor_config.json`",
        f"one patch is {spec.stride} x {spec.stride} pixels; sides are multiples of {spec.stride}",
        *([f"checked: {form.checked}"] if form.checked else []),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


def _licence(licences: Licences) -> list[str]:
    """A line for each network of the chain, then what is to be done about it."""
    if not licences.terms:
        return ["None is stated for this network."]
    lines = ["The networks it comes from, and what is stated of the licence of each:", ""]
    lines += [f"- {each.describe()}" for each in licences.terms]
    without = [each.network for each in licences.terms if each.identifiers and not each.files]
    if without:
        lines += [
            "",
            f"The text of the licence of {', '.join(without)} did not lie beside its weights; add it where the "
            "licence asks for a copy.",
        ]
    if licences.problems:
        lines += ["", "**Find the licence out before you pass this network on.**"]
    elif licences.texts:
        lines += [
            "",
            "The files named above go with every copy; read them, they may bind what is made from this network.",
        ]
    return lines


def _code(name: str, inputs: Inputs, form: Form) -> list[str]:
    """Blocks that each run by themselves beside the folder."""
    mean, std = (list(map(float, each)) for each in (inputs.mean, inputs.std))
    size = f"({inputs.size}, {inputs.size})"
    lines = ["Each block runs by itself, beside this folder.", ""]
    for above, block, is_runnable in form.blocks:
        imports = [line for line in block if line.startswith(("import ", "from "))]
        rest = "\n".join(line for line in block if line not in imports).strip("\n").split("\n")
        lines += [above, "", "```python" if is_runnable else "```"]
        lines += sorted({"import numpy as np", "import torch", "from PIL import Image", *imports})
        lines += [
            "",
            f'folder = "{name}"',
            'image = Image.new("RGB", (640, 480), "teal")  # or Image.open(PATH).convert("RGB")',
            f"image = image.resize({size}, Image.Resampling.BILINEAR)",
            "pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255",
            f"mean, std = torch.tensor({mean}), torch.tensor({std})",
            "pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)",
            *rest,
            "```",
            "",
        ]
    if form.library == "transformers":
        lines += [
            "`AutoImageProcessor` of transformers prepares images in the same way from "
            "`preprocessor_config.json`; it needs torchvision (`pip install torchvision`), the code above does not.",
            "",
        ]
    return lines


def _sections(form: Form) -> list[str]:
    return [
        line
        for title, facts in form.sections
        for line in (f"## {title}", "", *(f"- {fact}" for fact in facts), "")
    ]


def _files(files: Sequence[WrittenFile]) -> list[str]:
    if not files:
        return []
    rows = [f"| {file.name} | {file.num_bytes:,} | {file.sha256} |" for file in files]
    return ["", "## Files", "", "| file | bytes | sha256 |", "| --- | ---: | --- |", *rows]


def _known(facts: Mapping[str, Any], key: str) -> str:
    return str(facts[key]) if key in facts else "unknown"


def _scores(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Rows of k-NN scores: this network, its untrained copy, its teacher and the baselines."""
    entry = summary.get("teacher", {}) if name == TEACHER else summary.get("students", {}).get(name)
    if not entry or entry.get("knn") is None:
        reason = summary.get("knn_reason", "the run was not scored")
        return [f"No k-NN scores: {reason}."]
    baselines = summary.get("baselines", {})
    rows = {
        "this network": entry["knn"],
        "the same network untrained": baselines.get("untrained", {}).get(name),
        "its teacher": None if name == TEACHER else summary.get("teacher", {}).get("knn"),
        "raw pixels": baselines.get("pixels"),
        "colour mean and spread": baselines.get("colour"),
    }
    computed = f", computed in {entry['knn_in']}" if entry.get("knn_in") else ""
    return [
        f"k-NN on held-out images of the run: k = {KNN_K}, cosine similarity of class features among the "
        f"training images, balanced accuracy over the classes{computed}.",
        "",
        "| | k-NN |",
        "| --- | ---: |",
        *(f"| {label} | {score:.3f} |" for label, score in rows.items() if score is not None),
    ]
