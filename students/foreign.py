"""Networks of other families, known by the names of their tensors: what a file is that is not ours."""

import re
from collections.abc import Collection, Mapping

OURS = (
    "Teachers are DINOv3 networks: a ViT with RoPE and register tokens, or a ConvNeXt. "
    "Another network can be a student (docs/custom-students.md)."
)
NO_ADDRESS = "no register tokens: a plain ViT with learned position embeddings (DINO, MAE, DeiT)"
_REGISTERS = ("storage_tokens", "reg_token", "register_tokens")
_POSITIONS = ("pos_embed", "position_embeddings")
# part of a name -> what has it; the first that occurs counts
_PARTS: Mapping[str, tuple[str, str]] = {
    r"\blora_": (
        "a LoRA adapter, which changes another network's weights",
        "Merge it into its network (peft: merge_and_unload) and save that.",
    ),
    r"\b(qweight|weight_scale|weight_scale_inv|SCB|absmax|quant_state)\b": (
        "a quantised network",
        "Give the weights in fp32, fp16 or bf16 that it was made from.",
    ),
    r"\b(lm_head|embed_tokens|wte|word_embeddings)\b": ("a language model", OURS),
    r"\b(class_embedding|resblocks|vision_model)\b": ("a CLIP or SigLIP network", OURS),
    r"\bencoder_layer_0\b|\bconv_proj\.weight$": ("a ViT of torchvision", OURS),
    r"^features\.\d+\.\d+\.": ("a network of torchvision (its ConvNeXt, EfficientNet, VGG)", OURS),
    r"\blayer1\.0\.(conv1|bn1)\b": ("a ResNet (torchvision or timm)", OURS),
    r"\brelative_position_bias_table$": ("a Swin or BEiT network", OURS),
    r"\bgrn\.": ("a ConvNeXt V2, which has another block", OURS),
    r"\b(exp_avg|exp_avg_sq|momentum_buffer)\b": (
        "the state of an optimizer",
        "Give the file that holds the network's weights.",
    ),
}


class ForeignError(ValueError):
    """A file of something else; ``fix`` is what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def describe_foreign(names: Collection[str]) -> tuple[str, str] | None:
    """What a file is that holds no backbone of ours, and what to do; None where that is not known.

    Args:
        names: of its tensors.
    """
    has_positions = any(_last(name) in _POSITIONS for name in names)
    has_class = any(_last(name) == "cls_token" for name in names)
    if has_class and has_positions:
        scales = any(re.search(r"\b(ls1\.gamma|layer_scale1\.lambda1)$", name) for name in names)
        if scales:
            return "DINOv2: it has learned position embeddings where DINOv3 has RoPE", OURS
        return f"has {NO_ADDRESS}", OURS
    for pattern, (what, fix) in _PARTS.items():
        if any(re.search(pattern, name) for name in names):
            return what, fix
    if has_class and not any(_last(name) in _REGISTERS for name in names):
        return "a ViT with no register tokens, which DINOv3 has", OURS
    return None


def _last(name: str) -> str:
    return name.rpartition(".")[2].rpartition("/")[2]
