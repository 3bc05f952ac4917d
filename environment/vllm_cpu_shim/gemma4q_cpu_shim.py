"""Let a CUDA build of torchvision import beside a CPU build of torch.

PyPI carries torchvision as a CUDA build only. Its compiled half cannot load beside a CPU torch, so
the operators that its Python half names at import time do not exist and `import torchvision` dies
with `operator torchvision::nms does not exist`. Gemma 4's image processor needs only torchvision's
Python half. This module, loaded by a .pth file at interpreter start, waits for the first import of
torchvision and declares those operators (schema only: calling one is still an error).

It does nothing beside a CUDA torch or a CPU torchvision, and costs no import of torch.
"""

import importlib.abc
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _is_cuda_build(torchvision_init):
    version = Path(torchvision_init).with_name("version.py")
    return (
        version.is_file() and re.search(r"^__version__ = '[^']*\+cu\d", version.read_text(), re.MULTILINE) is not None
    )


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Runs once, before torchvision is imported; finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname)
        if spec is not None and spec.origin and _is_cuda_build(spec.origin):
            import torch

            if torch.version.cuda is None:
                # Kept alive by the module: a library's definitions end with the object.
                global _library
                _library = torch.library.Library("torchvision", "DEF")
                for schema in _SCHEMAS:
                    _library.define(schema)
        return None


sys.meta_path.insert(0, _DeclareOperators())
