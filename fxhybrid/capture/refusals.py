"""Why a model cannot be captured, in its user's words: the line, the module, and a way out."""

from __future__ import annotations

import itertools
import operator
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

from fxhybrid.capture.joint_graph import InputKind, InputRole
from fxhybrid.capture.random_numbers import RANDOM, is_random_input
from fxhybrid.errors import CaptureError, GraphBreakError
from fxhybrid.torch_internals import TorchDynamoException, Unsupported, UserError

LIBRARIES = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    sysconfig.get_paths()["stdlib"],
)
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n\s*(?P<text>[^\n]*)')
NOT_OURS = ("Hint:", "Developer debug context:", "For more details", "For more information", "User Stack")
VALUE = "leave the value a tensor, without .item(), float() or int()"
MASK = (
    "keep the shape: torch.where(mask, x, 0) in place of x[mask], and divide by mask.sum() for a mean; "
    "torch.where(mask, value, x) in place of x[mask] = value"
)
OTHER = "call it before the model and pass the result in, or compute on all elements and weigh them with a mask"
CONTROL_FLOW = "Rewrite that line without Python control flow on tensor values"
DRAW_BEFORE = RANDOM[0].upper() + RANDOM[1:]
GENERATOR = "Make the generator outside of forward, as an attribute of the model, or use torch.manual_seed"
FIRST_CALL = "If that block sets the model up at its first call, call the model once before; else leave the block out"
VALUES = f"A graph holds no Python number that depends on values: {OTHER}"
IN_PLACE = (
    "In eager this is an error only where that output gets a gradient; a plan has the gradients of all outputs. Return "
    "it detached, y.detach(), or use the operator that gives a new tensor: x = torch.relu(x) in place of torch.relu_(x)"
)
# What Dynamo's reason contains, and the way out.
WAYS_OUT = {
    "Data-dependent branching": CONTROL_FLOW,
    "Data-dependent assertion": CONTROL_FLOW,
    "Data dependent operator": VALUES,
    "data-dependent expression": VALUES,
    "Random.": DRAW_BEFORE,
    "RandomState": DRAW_BEFORE,
    "class `Generator`": DRAW_BEFORE,
    "torch._C.Generator": GENERATOR,
    "context manager": FIRST_CALL,
}
_STEPS = re.compile(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]")  # as Dynamo writes steps of a module's path

Frame = tuple[str, int, str, str]  # file, line, function, text of the line


def refuse_backward_hooks(module: nn.Module) -> None:
    """Refuses hooks of modules that run within the backward pass; those of tensors and parameters can be planned.

    Raises:
        CaptureError: names the hook's line, the module and a way out.
    """
    for name, part in module.named_modules():
        for hook in (*part._backward_pre_hooks.values(), *part._backward_hooks.values()):
            code = getattr(hook, "__code__", None)
            where = f"\n  at {code.co_filename}:{code.co_firstlineno}, in {code.co_name}" if code else f": {hook!r}"
            path = name.removeprefix("model").lstrip(".")
            raise CaptureError(
                f"module {path!r} has a backward hook, Python that runs within the backward pass{where}\n"
                "A plan has a backward graph in its place: remove the hook (its handle's remove()) while planned steps "
                "run, or hook the tensor instead, h.register_hook(...) in forward, where h is the module's output."
            )


def refuse_empty_buffers(inputs: Iterable[InputRole], values: Iterable[torch.Tensor]) -> None:
    """Refuses buffers that the step writes to and that have no elements yet: the first run gives them their size.

    Raises:
        CaptureError: names the buffer and a way out.
    """
    for role, value in zip(inputs, values, strict=True):
        if role.mutated and role.kind is InputKind.BUFFER and value.numel() == 0:
            raise CaptureError(
                f"buffer {role.name.removeprefix('model.')!r} has no elements yet, and the step writes to it, "
                "as observers of quantization do in their first run\n"
                "Run the plain model once on a batch, in training mode, before."
            )


def refuse_dynamic_sizes(module: fx.GraphModule) -> None:
    """Refuses operators whose result's size, or whose Python number, depends on values; drops those nobody reads.

    Args:
        module: Dynamo's graph, or AOTAutograd's, in which gradients may pick elements by a mask, too.

    Raises:
        GraphBreakError: names the operator, the user's line, the module and a way out.
    """
    for node in reversed(list(module.graph.nodes)):
        if node.op.startswith("call") and not node.users and _is_dynamic(node):
            module.graph.erase_node(node)  # read by a message only, which is left out too
    for node in module.graph.nodes:
        if _is_dynamic(node):
            frames = frames_of_text(node.meta.get("stack_trace") or "")
            what, way_out = _name_and_way_out(node)
            what += ", in the gradient of a line," if node.meta.get("partitioner_tag") == "is_backward" else ""
            raise GraphBreakError(
                f"{what} gives a size or a Python number that depends on values{_module_path(node)}{_where(frames)}\n"
                f"A plan needs all sizes before the step: {way_out}."
            )
    module.recompile()


def traced_error(error: TorchDynamoException) -> CaptureError:
    """Says where and why Dynamo stopped; what it does not support is a break between two graphs."""
    kind = GraphBreakError if isinstance(error, (Unsupported, UserError)) else CaptureError
    return kind(_tracing_message(error))


def _tracing_message(error: TorchDynamoException) -> str:
    frames = [
        (f.filename, f.lineno or 0, f.name, (f.line or "").strip()) for f in getattr(error, "real_stack", None) or ()
    ]
    reason = (error.msg if hasattr(error, "msg") else str(error)).strip()
    way_out = next((way for text, way in WAYS_OUT.items() if text in reason), "Leave that call out of forward")
    return (
        f"the model cannot be traced into one graph{_where(frames)}\n{_in_short(reason)}\n"
        f"{way_out}, or compile a submodule that can be traced."
    )


def _in_short(reason: str) -> str:
    """Returns Dynamo's reason without its hints, which are about graph breaks, and its pointers into torch."""
    kept = itertools.takewhile(lambda line: not line.strip().startswith(NOT_OURS), reason.splitlines())
    raised = re.search(r"^\s*Developer debug context: (raised exception .+)$", reason, re.M)
    return "\n".join([line for line in kept if line.strip()] + ([f"  The trace {raised[1]}"] if raised else []))


def differentiated_error(error: Exception) -> CaptureError:
    """Says what an operator raised while forward and backward were traced, and in which line of the user's."""
    text, _, trace = str(error).partition("\n\nWhile executing")
    where = _where(frames_of_text(trace))
    if isinstance(error, GuardOnDataDependentSymNode):
        name = re.search(r"target=(?:torch\.)?(?P<name>[\w.]+)", trace)
        what = name["name"] if name else "an operator"
        return GraphBreakError(f"{what} needs a size or a Python number that depends on values{where}\n{VALUES}.")
    if "modified by an inplace operation" in text:
        return CaptureError(
            f"the model changes in place what the gradient of an output needs{where}\n{text}\n{IN_PLACE}"
        )
    return CaptureError(
        f"tracing the step fails with {type(error).__name__}: {text.strip()}{where}\n"
        "Does the plain model run forward and backward with these arguments?"
    )


def _is_dynamic(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value is not None and bool(free_unbacked_symbols(value))


def _name_and_way_out(node: fx.Node) -> tuple[str, str]:
    if any(is_random_input(n) for n in node.all_input_nodes):
        return "a random integer", RANDOM
    target: Any = getattr(node.target, "overloadpacket", node.target)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if name in ("item", "tolist", "__float__", "__int__", "_local_scalar_dense"):
        return ".item()" if name.startswith("_local") else f".{name}()", VALUE
    if target is operator.getitem or name in ("__getitem__", "index"):
        return "indexing with a mask", MASK
    if name == "masked_select":
        return name, MASK
    return name, OTHER


def _module_path(node: fx.Node) -> str:
    """The innermost module that the node belongs to, as its user names it."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = dotted_path(str(list(stack.values())[-1][0])) if stack else ""
    return f", in module {path!r}" if path else ""


def dotted_path(source: str) -> str:
    """Returns a module's path from the user's model, out of Dynamo's ``L['self'].model.layers[0]``."""
    inner = source.removeprefix("L['self']")
    inner = _STEPS.sub(lambda step: "." + next(name for name in step.groups() if name is not None), inner)
    return inner.lstrip(".").removeprefix("model").lstrip(".")


def frames_of_text(text: str) -> list[Frame]:
    """Reads the frames of a traceback's text, the innermost last."""
    return [(m["file"], int(m["line"]), m["name"], m["text"].strip()) for m in FRAME.finditer(text)]


def _where(frames: Iterable[Frame]) -> str:
    """The last frame that is neither torch's nor Python's nor ours, else torch's, as a line of a message."""
    known = [frame for frame in frames if not frame[0].startswith(("<", LIBRARIES[1]))]
    own = [frame for frame in known if not is_library(frame[0])]
    return '\n  at {}:{}, in {}: "{}"'.format(*(own or known)[-1]) if known else ""


def is_library(path: str) -> bool:
    """Tells whether a source file is torch's, ours or Python's own."""
    own = path.startswith(("<", *LIBRARIES[:2]))
    return own or ("site-packages" not in path and path.startswith(LIBRARIES[2]))
