"""Custom students: a module of yours, a transformers backbone, a timm model.

    "package.module:factory"     factory(**args) returns the network; from the current folder or installed
    "transformers:NAME"          a model type such as convnextv2 or resnet, with args for its config, or a local folder
    "timm:NAME"                  timm.create_model(NAME, **args), where timm is installed

A custom network is an ``nn.Module`` with ``width`` (features) and ``stride`` (pixels per patch side)
whose forward pass takes images [rows, 3, height, width] and returns a class feature [rows, width] and
a patch map [rows, width, height / stride, width / stride]. That is the full protocol.

BatchNorm is trained as in ``students.batch_norm``. Other buffers that training moves are refused: the
EMA and the checkpoints would not hold them. Nothing is downloaded.
"""

import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from students.batch_norm import counting, group_norms
from students.shapes import CustomSpec
from teacher.batch import Features, RopeScale

# Arguments by which a library runs code, reads pickles or fetches files that are named elsewhere
LEADS_OUTSIDE = re.compile(
    r'"(trust_remote_code|auto_map|use_pretrained_backbone|checkpoint_path|\w*attn_implementation(?=": "[^"]*/))"'
)
TRANSFORMERS, TIMM = "transformers", "timm"
OUTER = "network."  # before the names of the factory's network, in an ``Adapted``
PROBE_STRIDES = (4, 6)  # sides of the test image in patches: not square, so a transposed map shows


class Adapted(nn.Module):
    """A network from outside as a ``teacher.batch.Backbone``."""

    def __init__(self, spec: CustomSpec, network: nn.Module) -> None:
        super().__init__()
        self.spec, self.width, self.stride = spec, spec.width, spec.stride
        self.network = network

    def forward(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None = None,
        *,
        rope_scale: RopeScale = 1.0,  # noqa: ARG002  # part of the protocol; there is no RoPE here
        is_local: bool = False,
    ) -> Features:
        """Class feature and patch map.

        Raises:
            ValueError: masks are given: a network from outside has no mask token.
        """
        if masks is not None:
            raise ValueError("a custom network has no mask token: it cannot see masked input")
        with counting(is_counted=not is_local):
            class_feature, patch_map = self.network(pixels)
        grid_hw = (patch_map.shape[2], patch_map.shape[3])
        return Features(class_feature, patch_map.flatten(2).transpose(1, 2), grid_hw)


def build_custom(spec: CustomSpec) -> Adapted:
    """The network on the CPU, with the weights that its factory gives; code from outside may not stand the meta device."""
    with torch.device("cpu"):
        network = Adapted(spec, make_network(spec.factory, json.loads(spec.args_json)))
        group_norms(network)
        return network


def init_custom_(network: Adapted, generator: torch.Generator) -> None:
    """The weights that the factory gives under a seed drawn from ``generator``; global state is left alone."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_custom(network.spec)
    network.load_state_dict(fresh.state_dict())


@lru_cache(maxsize=64)
def probe(factory: str, args_json: str) -> CustomSpec:
    """Builds a network once, forwards one image, and describes it.

    Raises:
        ValueError: it cannot be built, or does not keep to the protocol.
    """
    args = json.loads(args_json)
    with torch.random.fork_rng(devices=[]):
        network = make_network(factory, args)
    width, stride = _facts(network, factory)
    has_batch_norm = _has_batch_norm(network, factory)
    count = sum(parameter.numel() for parameter in network.parameters())
    spec = CustomSpec(factory, args_json, width, stride, count, has_batch_norm=has_batch_norm)
    height, across = (stride * patches for patches in PROBE_STRIDES)
    with torch.no_grad(), _in_one_line(factory, "its forward pass"):
        found = network.eval()(torch.zeros(2, 3, height, across))
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            f"{factory}: must return (class feature, patch map), gave {type(found).__name__}"
        )
    shapes = [list(part.shape) for part in found]
    wanted = [[2, width], [2, width, *PROBE_STRIDES]]
    if shapes != wanted:
        raise ValueError(
            f"{factory}: an image of {height} x {across} px gave {shapes[0]} and {shapes[1]}, "
            f"width {width} and stride {stride} promise {wanted[0]} and {wanted[1]}"
        )
    if not all(part.isfinite().all() for part in found):
        raise ValueError(f"{factory}: a black image gives numbers that are not finite")
    return spec


def _has_batch_norm(network: nn.Module, factory: str) -> bool:
    """Whether there is BatchNorm.

    Raises:
        ValueError: there are other buffers that training may move, or BatchNorm without running statistics.
    """
    norms = {name for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    try:
        group_norms(network)
    except ValueError as error:
        raise ValueError(f"{factory}: {error}") from error
    for name, buffer in network.named_buffers():
        is_state = buffer.is_floating_point() and name in network.state_dict()
        if is_state and name.rpartition(".")[0] not in norms:
            raise ValueError(
                f"{factory}: {name} is a buffer that training may move; only those of BatchNorm are averaged and saved"
            )
    return bool(norms)


@lru_cache(maxsize=256)
def count_flops(spec: CustomSpec, size: int) -> float:
    """Operations of one forward pass on one crop of ``size`` pixels, a multiply-add as two; counted, not estimated.

    Raises:
        ValueError: it does not take crops of this size.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_custom(spec).eval()
    pixels = torch.zeros(1, spec.in_channels, size, size)
    counting_flops = FlopCounterMode(display=False)
    with (
        counting_flops as counter,
        torch.no_grad(),
        _in_one_line(spec.factory, f"a crop of {size} px"),
    ):
        network(pixels)
    return float(counter.get_total_flops())


@contextmanager
def _in_one_line(factory: str, what: str) -> Iterator[None]:
    """Whatever code from outside raises, as a ValueError of one line that names the factory."""
    try:
        yield
    except Exception as error:
        raise _as_one_line(factory, what, error) from error


def _as_one_line(factory: str, what: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    return ValueError(f"{factory}: {what}: {type(error).__name__}: {reason}")


def _facts(network: nn.Module, factory: str) -> tuple[int, int]:
    facts = []
    for name in ("width", "stride"):
        if not hasattr(network, name) or not isinstance(getattr(network, name), int):
            raise ValueError(
                f"{factory}: the network must have an integer {name!r} as an attribute"
            )
        facts.append(getattr(network, name))
    return facts[0], facts[1]


def make_network(factory: str, args: Mapping[str, Any]) -> nn.Module:
    """The network of a factory, as it gives it.

    Raises:
        ValueError: it cannot be built.
    """
    source, _, name = factory.partition(":")
    outside = LEADS_OUTSIDE.search(json.dumps(args))
    if source in (TRANSFORMERS, TIMM) and outside is not None:
        raise ValueError(
            f"{factory}: args.{outside[1]}: not allowed, it runs code, reads pickles or fetches files from elsewhere; "
            'write arch: "module:Factory" for a module of yours'
        )
    if source == TRANSFORMERS:
        return _TransformersNetwork(name, args)
    if source == TIMM:
        return _TimmNetwork(name, args)
    return _from_module(source, name, args)


def _from_module(module_name: str, name: str, args: Mapping[str, Any]) -> nn.Module:
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{module_name}:{name}: the modules of Python hold no networks; name a function or class "
            "of an installed package, or of a module in the folder you stand in"
        )
    if "" not in sys.path:
        sys.path.append("")  # the current folder, after everything that is installed
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{module_name}:{name}: {error}; run distill in the folder that holds the module, "
            "or pass --allow-code if it lies beside the recipe or the weights"
        ) from error
    except Exception as error:
        raise _as_one_line(f"{module_name}:{name}", "its module", error) from error
    if not callable(getattr(module, name, None)):
        known = [key for key in vars(module) if not key.startswith("_")]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" - did you mean {close[0]!r}?" if close else ""
        where = f" ({module.__file__})" if module.__file__ else ""
        raise ValueError(f"{module_name}:{name}: the module{where} has no such factory{hint}")
    found = inspect.unwrap(getattr(module, name))
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ValueError(
            f"{module_name}:{name}: is a {type(found).__name__}; "
            "must be a function or class that returns a network"
        )
    with _in_one_line(f"{module_name}:{name}", "the factory"):
        network = getattr(module, name)(**args)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{module_name}:{name}: gave a {type(network).__name__}, not an nn.Module")
    return network


class _TransformersNetwork(nn.Module):
    """The last feature map of a transformers backbone; the class feature is its mean over the map."""

    def __init__(self, name: str, args: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            library = importlib.import_module(TRANSFORMERS)
        except ImportError as error:
            raise ValueError(f"transformers:{name}: {error}; pip install transformers") from error
        side = 224
        with torch.no_grad(), _in_one_line(f"transformers:{name}", "its network"):
            backbone = _from_transformers(library, name, args)
            self.backbone = backbone.eval()  # what looks at the map must not move its statistics
            last = self._map(torch.zeros(1, 3, side, side))
        self.train()
        self.width, self.stride = int(last.shape[1]), side // int(last.shape[2])

    def _map(self, image: Tensor) -> Tensor:
        found = self.backbone(image)
        last: Tensor = (
            found.feature_maps[-1] if hasattr(found, "feature_maps") else found.last_hidden_state
        )
        return last

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        patch_map = self._map(image)
        return patch_map.mean(dim=(2, 3)), patch_map


def _from_transformers(library: Any, name: str, args: Mapping[str, Any]) -> nn.Module:
    """A backbone of transformers, or the model itself where its last hidden state is a map (RegNet, MobileNet)."""
    is_folder = "/" in name or "." in name  # a local folder; the hub is never queried
    if is_folder:
        config = library.AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    else:
        config = library.AutoConfig.for_model(name, **args)
    known = library.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES
    kind = library.AutoBackbone if config.model_type in known else library.AutoModel
    if is_folder:
        network = kind.from_pretrained(name, local_files_only=True, trust_remote_code=False, **args)
    else:
        network = kind.from_config(config)
    assert isinstance(network, nn.Module), "a model of transformers"
    return network


class _TimmNetwork(nn.Module):
    """The last feature map of a timm model, and what it pools from it.

    Where layers behind the pooling give that another width, as in MobileNetV3 and EfficientNet, they are left out:
    the class feature is the map's mean, so that both features have one width, as the protocol wants.
    """

    def __init__(self, name: str, args: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            library = importlib.import_module(TIMM)
        except (ImportError, RuntimeError) as error:  # torchvision raises either
            raise ValueError(
                f"timm:{name}: timm cannot be imported ({error}); pip install timm"
            ) from error
        side = 224
        self.is_mean = False
        with torch.no_grad(), _in_one_line(f"timm:{name}", "its network"):
            model = library.create_model(name, pretrained=False, num_classes=0, **args)
            self.model = model.eval()
            class_feature, last = self(torch.zeros(1, 3, side, side))
            self.is_mean = class_feature.shape[1] != last.shape[1]
            if self.is_mean:
                model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        self.train()
        self.width, self.stride = int(last.shape[1]), side // int(last.shape[2])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        final, (patch_map,) = self.model.forward_intermediates(
            image, indices=1, output_fmt="NCHW", norm=True
        )
        if self.is_mean:
            return patch_map.mean(dim=(2, 3)), patch_map
        return self.model.forward_head(final, pre_logits=True), patch_map
