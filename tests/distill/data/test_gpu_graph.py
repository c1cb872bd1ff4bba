"""Images on a GPU machine: decoded by the CPU and copied, or by the graph for a GPU, put together without one."""

import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import nvidia.dali.backend as backend
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image
from torch import Tensor

from distill.data import pipeline as graph
from distill.data.bad_samples import BadSamples
from distill.data.build_index import build_index
from distill.data.crops import CropSchedule, CropSpec
from distill.data.feed import Feed
from distill.data.loader import Loader
from distill.data.pipeline import build_pipeline, find_refused
from distill.data.sampler import Pool, Sampler
from distill.errors import SetupError
from distill.job.to_data import build_loader
from distill.launch import doctor
from distill.listing.decode import Decoding
from distill.recipe.reader import load_recipe
from distill.recipe.recipe_hash import recipe_hash
from tests.support.gpu import ON_GPU
from tests.support.pictures import picture
from tests.support.pretend_gpu import GPU

RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
SPEC = CropSpec(32, (0.32, 1.0), 2, 16, (0.05, 0.32), 48, 0.5, (0.1, 2.0))
EXISTING = {
    "cpu": backend.RegisteredCPUOps(),
    "gpu": backend.RegisteredGPUOps(),
    "mixed": backend.RegisteredMixedOps(),
}


@pytest.mark.parametrize("reduces", [False, True])
def test_build_pipeline__puts_every_operator_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, *, reduces: bool
) -> None:
    monkeypatch.setattr(Pipeline, "build", Pipeline._build_graph)  # no more than Python's part
    spec = replace(SPEC, reduces_anchors=reduces)
    pipeline = build_pipeline(spec, lambda: (), batch=4, num_threads=2, device_id=0, prefetch=2)
    placed = {(operator._op.device, _schema_of(operator._op)) for operator in pipeline._ops}
    assert {("mixed", "decoders__Image"), ("gpu", "Resize"), ("gpu", "GaussianBlur")} <= placed
    (decoding,) = (each for each in pipeline._ops if _schema_of(each._op) == "decoders__Image")
    arguments = str(
        decoding.spec
    )  # a part of the batch to other hardware makes pixels depend on the place
    assert "hw_decoder_load: 0.0" in arguments and "jpeg_fancy_upsampling: True" in arguments
    for device, schema in placed:
        assert schema in EXISTING[device], (device, schema)
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"] * 3


def _schema_of(operator: Any) -> str:
    return str(getattr(operator, "schema_name", None) or type(operator).__name__)


def test_find_refused__asks_the_decoder_of_the_cpu() -> None:
    """Without a GPU, on every machine alike."""
    good, truncated = (
        np.frombuffer(encoded, np.uint8) for encoded in (_jpeg(), b"\xff\xd8\xff\xe0" + bytes(64))
    )
    with Image.open(io.BytesIO(good.data)) as file:
        hw = file.height, file.width
    assert find_refused([(good, hw), (truncated, hw), (good, (hw[0], 1))]) == [1, 2]


def loader(folder: Path, device: torch.device, decode: Literal["cpu", "gpu"] = "cpu") -> Loader:
    """Over six photographs in ``folder``, which are written first."""
    folder.mkdir(exist_ok=True)
    for i in range(6):
        Image.fromarray(picture(i, 80 + i, 96)).save(folder / f"{i}.jpg", quality=90)
    index, crops = build_index([folder], max_bad_fraction=0.0), CropSchedule.one(SPEC)
    sampler, bad = Sampler([Pool(0, len(index))], 5, [(0, 6)]), BadSamples(None, 1.0)
    settings: dict[str, Any] = {"stop_step": 100, "decoding": Decoding(64.0, None)}
    feed = Feed(index, crops, sampler, bad, positions=lambda _: range(4), **settings)
    return Loader(feed, crops, max_images=4, num_threads=2, device=device, decode=decode)


def test_fetch__a_gpu_gets_the_pixels_of_the_cpu_from_page_locked_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_cpu = loader(tmp_path / "images", torch.device("cpu"))
    expected = [of_cpu.fetch(step) for step in range(2)]
    of_cpu.close()
    pinned_by, pinned, copied = list[str](), set[int](), list[bool]()

    def pin(tensor: Tensor) -> Tensor:
        pinned_by.append(threading.current_thread().name)
        page_locked = tensor.clone()
        pinned.add(page_locked.data_ptr())
        return page_locked

    def copy(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        copied.append(device == GPU and non_blocking and tensor.data_ptr() in pinned)
        return tensor

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    of_gpu = loader(tmp_path / "images", GPU)
    for step, wanted in enumerate(expected):
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "to", copy)
            got = of_gpu.fetch(step)
        for name in ("global_crops", "local_crops", "anchor_crops"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    of_gpu.close()
    assert copied == [True] * 6  # three kinds of crops in two steps
    assert set(pinned_by) == {"decode_0"}  # the thread of the decoder, while the loop goes on


def test_fetch__a_gpu_that_cannot_decode_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(*_: Any) -> Any:
        raise RuntimeError("nvjpeg: cannot open shared object\nStacktrace (10 entries)")

    monkeypatch.setattr(graph, "build_pipeline", no_library)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    made = loader(tmp_path / "images", GPU, "gpu")
    with pytest.raises(
        SetupError, match=r"data\.decode = gpu: .*\(nvjpeg: cannot open.*object\)"
    ) as e:
        made.fetch(0)
    made.close()
    assert "data.decode=cpu" in e.value.fix


def test_build_loader__a_gpu_decodes_only_where_one_computes(tmp_path: Path) -> None:
    of_cpu = loader(tmp_path / "images", torch.device("cpu"))
    recipe = load_recipe(RECIPE, ["data.decode=gpu"])
    with pytest.raises(SetupError, match="nothing computes on a GPU"):
        build_loader(recipe, of_cpu._feed, of_cpu._crops, 4, torch.device("cpu"))
    of_cpu.close()


def test_decode__decides_the_pixels_so_it_is_in_the_hash_and_its_default_is_not() -> None:
    before, other = (recipe_hash(load_recipe(RECIPE, words)) for words in ([], ["data.decode=gpu"]))
    assert recipe_hash(load_recipe(RECIPE, ["data.decode=cpu"])) == before != other


def test_doctor__says_whether_the_gpu_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._gpu_decoder() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    (found,) = doctor._gpu_decoder()  # there is none, and DALI says so
    assert found.is_ok and found.found.startswith("none, `data.decode: gpu` would be refused (")
    monkeypatch.setattr(graph, "decode_alone", lambda *_: None)
    (found,) = doctor._gpu_decoder()
    assert found.found == "DALI decodes on the GPU (`data.decode: gpu`)"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_fetch__a_gpu_decodes_within_two_levels_of_the_cpu(device: str, tmp_path: Path) -> None:
    """In the mean over an image: a resize that begins half a pixel elsewhere shows at edges."""
    both = [loader(tmp_path / "images", torch.device(device, 0), by) for by in ("cpu", "gpu")]
    for step in range(3):
        first, second = (each.fetch(step).global_crops.float() for each in both)
        assert (first - second).abs().mean() < 2.0
    for each in both:
        each.close()


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()
