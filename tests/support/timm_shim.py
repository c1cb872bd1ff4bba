"""timm beside the CPU build of torch: torchvision imports once its operators are declared.

torchvision's compiled part belongs to one build of torch; beside another its import ends with ``operator
torchvision::nms does not exist``. No network of timm calls one of these operators, so declaring them is enough.
"""

from pathlib import Path

INSTALL = "pip install --no-deps timm==1.0.31 torchvision==0.29.1"
OPERATORS = (
    "nms",
    "qnms",
    "deform_conv2d",
    "_deform_conv2d_backward",
    *(f"{kind}_{each}" for kind in ("roi", "ps_roi") for each in ("align", "pool")),
    *(f"_{kind}_{each}_backward" for kind in ("roi", "ps_roi") for each in ("align", "pool")),
    "qroi_align",
)
STARTUP = f"""\
import sys


class Declares:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in {OPERATORS}:
                torch.library.define(f"torchvision::{{operator}}", "(Tensor x) -> Tensor")


sys.meta_path.insert(0, Declares())
"""


def write_startup(folder: Path) -> Path:
    """What every interpreter runs that has the folder, which is made, on its PYTHONPATH; returns the folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STARTUP)
    return folder
