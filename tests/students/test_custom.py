"""Networks from outside: the documented example, transformers backbones, and what is refused."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from students.custom import count_flops, probe
from students.shapes import CustomSpec
from students.student import seeded

DOCS = Path(__file__).parents[2] / "docs" / "custom-students.md"


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example of the documentation as a module."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "mynet.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(tmp_path)
    probe.cache_clear()
    yield "mynet:Pyramid"
    sys.modules.pop("mynet", None)


def write(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    text = "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n"
    text += "    def __init__(self):\n        super().__init__()\n"
    text += "        self.width, self.stride = 4, 8\n        self.conv = nn.Conv2d(3, 4, 8, 8)\n"
    (folder / f"{name}.py").write_text(text + body)
    monkeypatch.syspath_prepend(folder)
    return f"{name}:Net"


def test_probe__the_documented_example_works(mynet: str) -> None:
    spec = probe(mynet, '{"width": 48}')
    assert (spec.width, spec.stride) == (48, 8)
    network = spec.build()
    found = network(torch.randn(2, 3, 16, 24))
    assert found.grid_hw == (2, 3)
    assert found.class_token.shape == (2, 48) and found.patch_tokens.shape == (2, 6, 48)
    assert spec.parameters == sum(p.numel() for p in network.parameters())
    found.patch_tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    with pytest.raises(ValueError, match="no mask token"):
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, dtype=torch.bool))


def test_documented_example__has_at_most_twenty_lines() -> None:
    block = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


def test_init_weights__depend_on_the_generator_alone(mynet: str) -> None:
    spec = probe(mynet, "{}")
    networks = []
    for seed, noise in ((0, 1), (0, 2), (1, 3)):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        network = spec.build()
        torch.random.set_rng_state(before)
        spec.init_(network, seeded(seed, "pyramid"))
        assert torch.equal(torch.random.get_rng_state(), before)
        networks.append(network.state_dict())
    one, same, other = networks
    assert all(torch.equal(one[key], tensor) for key, tensor in same.items())
    assert not torch.equal(one["network.layers.0.weight"], other["network.layers.0.weight"])


def test_count_flops__equals_the_hand_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "    def forward(self, x):\n        m = self.conv(x)\n        return m.mean((2, 3)), m\n"
    spec = probe(write(tmp_path, "handnet", body, monkeypatch), "{}")
    assert count_flops(spec, 32) == 2 * 16 * 4 * 3 * 64


@pytest.mark.parametrize(
    ("model_type", "args"),
    [
        ("convnextv2", {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2}),
        (
            "dinov2",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 16,
                "image_size": 224,
            },
        ),
        ("swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}),
        ("resnet", {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}),
        ("regnet", {"depths": [1, 1], "hidden_sizes": [8, 16], "groups_width": 8}),
        ("mobilenet_v2", {"depth_multiplier": 0.1}),
    ],
)
def test_probe__transformers_backbones(model_type: str, args: dict[str, object]) -> None:
    spec = probe(f"transformers:{model_type}", json.dumps(args))
    network = spec.build()
    spec.init_(network, seeded(0, model_type))
    found = network(torch.randn(1, 3, 8 * spec.stride, 8 * spec.stride))
    assert found.patch_tokens.shape == (1, 64, spec.width)
    assert count_flops(spec, 8 * spec.stride) > 0


NETS = {
    "no tuple": (
        "    def forward(self, x):\n        return self.conv(x)\n",
        r"must return \(class feature, patch map\)",
    ),
    "wrong width": (
        "    def forward(self, x):\n        m = self.conv(x)\n        return m.mean((2, 3))[:, :3], m\n",
        r"gave \[2, 3\]",
    ),
    "wrong grid": (
        "    def forward(self, x):\n        m = self.conv(x)\n        return m.mean((2, 3)), m.transpose(2, 3)\n",
        "width 4 and stride 8 promise",
    ),
    "not finite": (
        "    def forward(self, x):\n        m = self.conv(x) / 0\n        return m.mean((2, 3)), m\n",
        "numbers that are not finite",
    ),
    "running statistics": (
        "        self.norm = nn.InstanceNorm2d(4, track_running_stats=True)\n    def forward(self, x):\n        m = self.norm(self.conv(x))\n        return m.mean((2, 3)), m\n",
        "norm.running_mean is a buffer that training may move; only those of BatchNorm",
    ),
    "statistics of the batch": (
        "        self.norm = nn.BatchNorm2d(4, track_running_stats=False)\n    def forward(self, x):\n        m = self.norm(self.conv(x))\n        return m.mean((2, 3)), m\n",
        "norm: BatchNorm without running statistics",
    ),
    "an error in the forward pass": (
        "    def forward(self, x):\n        return self.conv(x.flatten())\n",
        "net_an_error_in_the_forward_pass:Net: its forward pass: RuntimeError: ",
    ),
    "an error in the factory": (
        "        raise RuntimeError('no GPU:\\ntwo lines')\n",
        "net_an_error_in_the_factory:Net: the factory: RuntimeError: no GPU:$",
    ),
    "an error in the module": (
        "        pass\nprint(1 / 0)\n",
        "net_an_error_in_the_module:Net: its module: ZeroDivisionError: division by zero$",
    ),
    "no stride": (
        "        del self.stride\n    def forward(self, x):\n        return x\n",
        "must have an integer 'stride'",
    ),
}


@pytest.mark.parametrize("kind", NETS)
def test_probe__refuses_what_breaks_the_protocol(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, message = NETS[kind]
    factory = write(tmp_path, f"net_{kind.replace(' ', '_')}", body, monkeypatch)
    with pytest.raises(ValueError, match=message) as refused:
        probe(factory, "{}")
    assert "\n" not in str(refused.value)


def test_count_flops__of_a_crop_that_the_network_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "    def forward(self, x):\n        assert x.shape[-1] > 32, 'too small'\n"
    body += "        m = self.conv(x)\n        return m.mean((2, 3)), m\n"
    spec = probe(write(tmp_path, "largenet", body, monkeypatch), "{}")
    with pytest.raises(ValueError, match="Net: a crop of 32 px: AssertionError: too small"):
        count_flops(spec, 32)


class Headed(nn.Module):
    """What timm's MobileNetV3 is to us: layers behind the pooling that make the class feature wider than the map."""

    def __init__(self, behind: int) -> None:
        super().__init__()
        self.stem, self.conv_head = nn.Conv2d(3, 4, 32, 32), nn.Linear(4, behind)

    def forward_intermediates(self, image: Tensor, **how: Any) -> tuple[Tensor, list[Tensor]]:
        assert how == {"indices": 1, "output_fmt": "NCHW", "norm": True}
        found = self.stem(image)
        return found, [found]

    def forward_head(self, found: Tensor, *, pre_logits: bool) -> Tensor:
        assert pre_logits
        return self.conv_head(found.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def prune_intermediate_layers(self, indices: int, **how: bool) -> None:
        assert (indices, how) == (1, {"prune_norm": False, "prune_head": True})
        del self.conv_head


def test_probe__class_feature_of_timm_is_the_maps_mean_where_it_would_have_another_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = ModuleType("timm")
    timm.create_model = lambda name, **how: Headed(int(name[1:]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    image = torch.randn(2, 3, 64, 96)
    for name, has_head in (("w4", True), ("w9", False)):
        spec = probe(f"timm:{name}", "{}")
        network = spec.build()
        found = network(image)
        assert (spec.width, spec.stride) == (4, 32) and found.class_token.shape == (2, 4)
        is_mean = torch.allclose(found.class_token, found.patch_tokens.mean(1), atol=1e-6)
        assert is_mean != has_head == ("network.model.conv_head.weight" in network.state_dict())


@pytest.mark.parametrize(
    ("factory", "args", "message"),
    [
        ("nowhere.at.all:Net", "{}", "run distill in the folder that holds the module"),
        ("torch.nn:Linaer", "{}", "no such factory - did you mean 'Linear'"),
        ("torch.nn:Linear", '{"size": 3}', "unexpected keyword argument"),
        ("torch:Size", "{}", "gave a Size, not an nn.Module"),
        ("transformers:nonsense", "{}", "transformers:nonsense: "),
        ("transformers:./nowhere", "{}", "transformers:./nowhere: "),
        ("timm:resnet18", "{}", "timm cannot be imported"),
    ],
)
def test_probe__says_what_is_missing(factory: str, args: str, message: str) -> None:
    if factory.startswith("timm") and _has_timm():
        pytest.skip("timm is installed and imports")
    with pytest.raises(ValueError, match=message):
        probe(factory, args)


def _has_timm() -> bool:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def test_custom_spec__is_a_value() -> None:
    assert CustomSpec("a:b", "{}", 4, 8, 16) == CustomSpec("a:b", "{}", 4, 8, 16)
    assert isinstance(hash(CustomSpec("a:b", "{}", 4, 8, 16)), int)


@pytest.mark.parametrize("factory", ["os:system", "builtins:exec", "importlib.util:find_spec"])
def test_probe__refuses_modules_of_python(factory: str) -> None:
    with pytest.raises(ValueError, match="the modules of Python hold no networks"):
        probe(factory, "{}")


def test_probe__takes_functions_and_classes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reexports.py").write_text("from os import system\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="must be a function or class"):
        probe("reexports:system", "{}")


@pytest.mark.parametrize(
    ("factory", "key", "value"),
    [
        ("transformers:./folder", "trust_remote_code", True),
        ("transformers:detr", "use_pretrained_backbone", True),
        ("transformers:dinov2", "attn_implementation", "somebody/kernels"),
        ("timm:resnet18", "checkpoint_path", "weights.pth"),
    ],
)
def test_probe__never_lets_a_library_run_or_fetch_what_lies_elsewhere(
    factory: str, key: str, value: object
) -> None:
    with pytest.raises(ValueError, match=f"args.{key}: not allowed"):
        probe(factory, json.dumps({"outer": {key: value}}))
