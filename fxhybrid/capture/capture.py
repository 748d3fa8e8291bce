"""Capture: an unchanged module becomes one functional joint graph, without running it.

Dynamo traces the Python code (one full graph, or an error that names the user's line) and gives guards that
say for which later calls the graph holds; AOTAutograd traces forward and backward into undecomposed ATen ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxhybrid.capture.changing_floats import (
    FLOAT_BYTES,
    ChangingFloats,
    changing_floats,
    compute_floats_as_tensors,
    floats_as_inputs,
    has_floats,
)
from fxhybrid.capture.effect_tokens import drop_effect_tokens
from fxhybrid.capture.fake_tensor_fixes import fix_kernel_results
from fxhybrid.capture.intermediate_leaves import drop_intermediate_leaves
from fxhybrid.capture.joint_graph import (
    TAG,
    InputKind,
    InputRole,
    JointGraph,
    NodeTag,
    OutputKind,
    OutputRole,
    Phase,
    node_name,
)
from fxhybrid.capture.origins import traced_origin
from fxhybrid.capture.random_numbers import random_inputs, with_traced_types
from fxhybrid.capture.refusals import (
    differentiated_error,
    refuse_backward_hooks,
    refuse_dynamic_sizes,
    refuse_empty_buffers,
    traced_error,
)
from fxhybrid.capture.shared_memory import overlap_pattern
from fxhybrid.capture.tracing_settings import tracing_settings, without_value_checks
from fxhybrid.capture.value_checks import assert_tensors
from fxhybrid.errors import CaptureError, FxHybridError
from fxhybrid.ops.bernoulli import DECOMPOSITIONS, mark_contiguous_bernoulli
from fxhybrid.ops.ctc_loss import make_ctc_loss_opaque
from fxhybrid.ops.gru_cell import make_gru_cells_opaque
from fxhybrid.ops.masked_sum import sum_chosen_elements
from fxhybrid.ops.recurrent import make_opaque
from fxhybrid.torch_internals import (
    TorchDynamoException,
    TracingContext,
    aot_export_joint_with_descriptors,
    convert_frame,
    functorch_config,
    tracing,
)

FlatFunction = Callable[..., Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Capture:
    """A captured signature.

    Attributes:
        joint: the joint graph.
        metadata: AOTAutograd's description of mutations and aliased outputs.
        holds: whether this capture is valid for a call with these arguments (Dynamo's guards).
        bind: turns a function over the graph's flat inputs into one with the module's own signature.
        flat_names: for each graph input, the parameter's or buffer's name, or "" for a user input.
        float_bytes: of inputs of the graph that are Python floats in the call.
    """

    joint: JointGraph
    metadata: Any
    holds: Callable[..., bool]
    bind: Callable[[FlatFunction], Callable[..., Any]]
    flat_names: tuple[str, ...]
    float_bytes: int


def capture(module: nn.Module, args: tuple[Any, ...], *, exact: bool = True) -> Capture:
    """Traces ``module(*args)`` and its backward pass.

    Args:
        module: to be traced.
        args: of the call.
        exact: whether gradients must have eager's very bits; without, recurrent layers take less memory.

    Raises:
        GraphBreakError: the model can be traced into several graphs only.
        CaptureError: it cannot be traced, or does something that the joint graph cannot carry; the message names the
            user's line where Dynamo knows it.
    """
    refuse_backward_hooks(module)
    floats = changing_floats(module)
    if floats.inputs:
        try:
            return _capture(module, args, exact, floats)
        except CaptureError:
            floats.make_constant()  # an error of the model's own comes again
    return _capture(module, args, exact, floats)


def _capture(module: nn.Module, args: tuple[Any, ...], exact: bool, floats: ChangingFloats) -> Capture:
    """Traces a call with these floats as inputs of the graph."""
    try:
        with tracing_settings(), floats_as_inputs(floats.inputs):
            traced = convert_frame.fullgraph_capture(module, args, {})
            if traced.backend_input is None:
                raise CaptureError("the model runs no tensor operation, so there is nothing to plan")
            random_positions = random_inputs(traced.backend_input.graph_module)
            joint, metadata, names = differentiated(module, traced.backend_input, exact=exact)
            output = traced.graph_capture_output
            function, _ = convert_frame.get_traced_fn(module)
            manager = output.build_guards(function.__code__).guard_manager
            env = output.get_runtime_env()
    except FxHybridError:
        raise
    except TorchDynamoException as error:
        raise traced_error(error) from error
    except Exception as error:  # AOTAutograd passes on whatever the model's operators raise
        raise differentiated_error(error) from error
    backend_id = traced.backend_input.backend_id
    parameters = list(_parameter_names(function))

    writes_input = any(role.mutated and role.kind is InputKind.USER_INPUT for role in joint.inputs)
    pattern = overlap_pattern(_tensors(args)) if writes_input else None

    def holds(*call: Any) -> bool:
        named = dict(zip(parameters, call, strict=True))
        same = bool(manager.root.check(named))
        if not same:  # by what a guard of ``torch.distributions`` remembers, at most
            with without_value_checks():
                same = bool(manager.check(named))
                if not same:
                    floats.note(manager, named)
        return same and (pattern is None or overlap_pattern(_tensors(call)) == pattern)

    def bind(flat: FlatFunction) -> Callable[..., Any]:
        flat = with_traced_types(flat, random_positions)
        return env.forward_callable(backend_id, flat, extra_globals=function.__globals__)

    return Capture(joint, metadata, holds, bind, names, FLOAT_BYTES * len(floats.inputs))


def differentiated(module: nn.Module, backend_input: Any, *, exact: bool) -> tuple[JointGraph, Any, tuple[str, ...]]:
    """Prepares Dynamo's graph, in place, and traces it and its backward pass.

    Args:
        module: owns the graph's parameters and buffers.
        backend_input: the graph, its inputs and their fake mode.
        exact: whether gradients must have eager's very bits.

    Returns:
        The joint graph, AOTAutograd's metadata, and the name of the parameter or buffer behind each input.
    """
    graph = backend_input.graph_module
    drop_intermediate_leaves(graph)
    assert_tensors(graph)
    refuse_dynamic_sizes(graph)
    make_opaque(graph, in_segments=not exact)
    make_gru_cells_opaque(graph)
    make_ctc_loss_opaque(graph)
    mark_contiguous_bernoulli(graph)
    return _joint_graph(module, backend_input)


def _tensors(args: tuple[Any, ...]) -> list[torch.Tensor]:
    """All tensors of a call; Dynamo compares overlaps only for inputs that overlapped when it traced."""
    return [leaf for leaf in pytree.tree_leaves(args) if _is_tensor(leaf)]


def _parameter_names(function: Any) -> tuple[str, ...]:
    code = function.__code__
    return tuple(code.co_varnames[: code.co_argcount])


def _joint_graph(module: nn.Module, backend_input: Any) -> tuple[JointGraph, Any, tuple[str, ...]]:
    names = _tensor_names(module)
    flat_names = tuple(names.get(id(t), ("", False))[0] for t in backend_input.example_inputs)
    described = _export(backend_input)
    if any(_overlaps(tangent) for tangent in described._aot_state.fw_metadata.traced_tangents):
        # A gradient cannot lie in memory as an output does whose elements share bytes (``unfold``).
        with functorch_config.patch(guess_tangent_strides_as_outputs=False):
            described = _export(backend_input)
    metadata = described._aot_state.fw_metadata
    graph_module = described.graph_module
    if has_floats(graph_module):
        compute_floats_as_tensors(graph_module, backend_input.fake_mode)
    refuse_dynamic_sizes(graph_module)
    drop_effect_tokens(graph_module)
    sum_chosen_elements(graph_module)
    _check_supported(metadata, graph_module, len(backend_input.example_inputs))
    _tag_phases(graph_module)
    fix_kernel_results(graph_module)
    inputs = _input_roles(metadata, backend_input.example_inputs, names)
    refuse_empty_buffers(inputs[: len(flat_names)], backend_input.example_inputs)
    return JointGraph(graph_module, inputs, _output_roles(metadata, len(flat_names))), metadata, flat_names


def _export(backend_input: Any) -> Any:
    context = TracingContext(backend_input.fake_mode)
    context.tensor_to_context = backend_input.tensor_to_context
    with tracing(context), contextlib.ExitStack() as stack:
        return aot_export_joint_with_descriptors(
            stack, backend_input.graph_module, tuple(backend_input.example_inputs), decompositions=DECOMPOSITIONS
        )


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements of ``tensor`` may share memory, by sizes and strides alone."""
    reach = 0  # furthest element, from the first, of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _tensor_names(module: nn.Module) -> dict[int, tuple[str, bool]]:
    """Name of each parameter (True) and buffer (False), by identity; a tied parameter has one name."""
    names = {id(b): (name, False) for name, b in module.named_buffers()}
    names.update({id(p): (name, True) for name, p in module.named_parameters()})
    return names


def _check_supported(metadata: Any, graph_module: fx.GraphModule, n_inputs: int) -> None:
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    n_tangents = len(metadata.traced_tangents)
    if not n_tangents or not any(info.requires_grad for info in metadata.input_info):
        raise CaptureError(
            "nothing in this call needs a gradient: no parameter has requires_grad=True, or no output "
            "depends on one; call the plain model instead, or unfreeze a parameter"
        )
    if len(placeholders) != n_inputs + n_tangents:
        raise CaptureError(
            "two inputs of the call share memory and one of them is changed in place; pass separate tensors"
        )
    for node in graph_module.graph.nodes:
        if any(t.layout is not torch.strided for t in pytree.tree_leaves(node.meta.get("val")) if _is_tensor(t)):
            raise CaptureError(f"{node_name(node)} gives a sparse tensor; use dense ones, such as sparse=False")
    for info in metadata.input_info:
        if info.mutates_metadata or (info.mutates_data and info.requires_grad):
            raise CaptureError(
                "the call changes an input that needs a gradient (or an input's shape) in place; "
                "work on a copy instead: x = x.clone()"
            )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _input_roles(
    metadata: Any, example_inputs: Sequence[Any], names: Mapping[int, tuple[str, bool]]
) -> tuple[InputRole, ...]:
    roles = []
    for position, (tensor, info) in enumerate(zip(example_inputs, metadata.input_info, strict=True)):
        if isinstance(tensor, torch.SymInt):
            roles.append(InputRole(InputKind.SIZE, str(position)))
            continue
        name, is_parameter = names.get(id(tensor), (str(position), False))
        kind = InputKind.USER_INPUT if id(tensor) not in names else InputKind.BUFFER
        roles.append(InputRole(InputKind.PARAMETER if is_parameter else kind, name, info.mutates_data))
    tangents = range(len(metadata.traced_tangents))
    return (*roles, *(InputRole(InputKind.TANGENT, str(i)) for i in tangents))


def _output_roles(metadata: Any, n_inputs: int) -> tuple[OutputRole, ...]:
    mutated = [OutputRole(OutputKind.MUTATION, i) for i in metadata.mutated_inp_runtime_indices]
    n_user = metadata.num_outputs + metadata.num_intermediate_bases
    user = [OutputRole(OutputKind.USER_OUTPUT, i) for i in range(n_user)]
    return (*mutated, *user, *(OutputRole(OutputKind.GRADIENT, i) for i in range(n_inputs)))


def _tag_phases(graph_module: fx.GraphModule) -> None:
    """Makes AOTAutograd's own record of forward and backward our one typed tag.

    Numbers have theirs: what the forward pass computes from sizes may be recorded as one of a tangent's sizes.
    """
    backward_seen: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        is_backward = node.meta.get("partitioner_tag") == "is_backward"
        if not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            is_backward = is_backward or any(n in backward_seen for n in node.all_input_nodes)
        if is_backward and node.op != "output":
            backward_seen.add(node)
        node.meta[TAG] = NodeTag(Phase.BACKWARD if is_backward else Phase.FORWARD, traced_origin(node))
