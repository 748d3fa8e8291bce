"""Imports torchvision beside a torch that its compiled operators were not built for.

torchvision's wheels on the package index hold operators for one build of torch only. Elsewhere the import fails, since
it gives fake implementations to operators that are not there. Their schemas are declared here, which is enough for
every model whose training step does not call them; ``nms`` and ``roi_align`` have no kernels then.
"""

from __future__ import annotations

import importlib.util

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared = torch.library.Library("torchvision", "FRAGMENT")  # as long as this object lives

if importlib.util.find_spec("torchvision") is None:
    raise ModuleNotFoundError("torchvision is missing: pip install --no-deps torchvision", name="torchvision")
try:
    import torchvision
except RuntimeError:  # "operator torchvision::nms does not exist"
    for schema in SCHEMAS:
        _declared.define(schema)
    import torchvision

__all__ = ["torchvision"]
