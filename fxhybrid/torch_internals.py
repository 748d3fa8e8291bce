"""Gathers what torch 2.13 does not call public and this project builds on; 2.14 has it, too.

No other file reaches into torch's private modules, so a torch release that moves something is met here, and by
``tests/test_torch_internals.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _prims_common as prims_common
from torch._C import DispatchKey
from torch._C import _autograd as profiler
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
)
from torch._C._profiler import (
    _EventType as EventType,
)
from torch._C._profiler import (
    _ExperimentalConfig as ExperimentalConfig,
)
from torch._decomp import meta_table
from torch._decomp.decompositions import upsample_compute_output_size
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, maybe_mark_dynamic, trace_rules
from torch._dynamo.bytecode_transformation import create_call_function, create_instruction, transform_code_object
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule, innermost_backend, set_enable_dynamic, skip_code
from torch._dynamo.exc import FailOnRecompileLimitHit, ShortenTraceback, TorchDynamoException, Unsupported, UserError
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.guards import _get_closure_vars as names_in_guards
from torch._dynamo.hooks import Hooks
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic
from torch._dynamo.source import RandomValueSource
from torch._dynamo.symbolic_convert import InstructionTranslatorBase, TensorifyState
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables import TupleVariable, builder
from torch._dynamo.variables.builtin import SetAttrBuiltinVariable
from torch._dynamo.variables.iter import DictViewIterator
from torch._dynamo.variables.lists import ListIteratorVariable
from torch._dynamo.variables.misc import RandomVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.runtime_wrappers import make_output_handler
from torch._functorch._aot_autograd.schemas import OutputType, TensorAlias
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.effects import with_effects
from torch._inductor import config as inductor_config
from torch._ops import OpOverload, OpOverloadPacket
from torch._prims_common import compute_required_storage_length, suggest_memory_format
from torch._subclasses import FakeTensor, FakeTensorMode, fake_impls
from torch._subclasses.fake_tensor import _BypassDispatchCache as BypassDispatchCache
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.sym_node import SymNode
from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "PROXY",
    "BypassDispatchCache",
    "DictViewIterator",
    "DisableAutocast",
    "DispatchKey",
    "EventType",
    "ExcludeDispatchKey",
    "ExperimentalConfig",
    "FailOnRecompileLimitHit",
    "FakeTensor",
    "FakeTensorMode",
    "FrameStateSizeEntry",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "GuardBuilder",
    "Hooks",
    "InstructionTranslatorBase",
    "LazyGraphModule",
    "ListIteratorVariable",
    "OpOverload",
    "OpOverloadPacket",
    "OptimizeContext",
    "OptimizedModule",
    "OutputGraph",
    "OutputType",
    "ProfilerActivity",
    "ProfilerConfig",
    "ProfilerState",
    "PythonPrinter",
    "RandomValueSource",
    "RandomVariable",
    "RecordScope",
    "SetAttrBuiltinVariable",
    "ShortenTraceback",
    "SymNode",
    "TensorAlias",
    "TensorifyState",
    "TorchDynamoException",
    "TorchInGraphFunctionVariable",
    "TracingContext",
    "TupleVariable",
    "Unsupported",
    "UserError",
    "aot_export_joint_with_descriptors",
    "auto_dynamic",
    "builder",
    "compute_required_storage_length",
    "convert_frame",
    "create_call_function",
    "create_instruction",
    "disable_current_modes",
    "dispatch_mode",
    "dynamo_config",
    "dynamo_timed",
    "fake_impls",
    "functorch_config",
    "get_metrics_context",
    "graph_is_kept",
    "inductor_config",
    "innermost_backend",
    "is_fx_symbolic_tracing",
    "is_jit_tracing",
    "make_output_handler",
    "maybe_mark_dynamic",
    "meta_table",
    "names_in_guards",
    "node_will_run",
    "prims_common",
    "profiler",
    "saved_tensor_hooks",
    "set_enable_dynamic",
    "set_inplace_requires_grad_allowed",
    "skip_code",
    "storage_use_count",
    "suggest_memory_format",
    "tensorify_python_scalars",
    "trace_rules",
    "tracing",
    "transform_code_object",
    "transform_stack",
    "tree_leaves",
    "tree_map",
    "upsample_compute_output_size",
    "with_effects",
]

PROXY: Any = torch._C._TorchDispatchModeKey.PROXY
DisableAutocast: Any = torch._C._DisableAutocast
ExcludeDispatchKey: Any = torch._C._SetExcludeDispatchKeyGuard
dispatch_mode: Any = torch._C._get_dispatch_mode
graph_is_kept: Any = profiler._get_current_graph_task_keep_graph
is_jit_tracing: Any = torch._C._is_tracing
node_will_run: Any = torch._C._will_engine_execute_node
saved_tensor_hooks: Any = profiler._top_saved_tensors_default_hooks
set_inplace_requires_grad_allowed: Any = torch._C._functorch.set_inplace_requires_grad_allowed
storage_use_count: Any = torch._C._storage_Use_Count
transform_stack: Any = torch._C._functorch.peek_interpreter_stack
