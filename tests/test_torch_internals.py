"""One file reaches into torch's private modules, and what it looks for is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import torch

from fxhybrid import torch_internals
from fxhybrid.capture import intermediate_leaves, symbolic_arithmetic
from fxhybrid.segments import graph_runner
from tests.test_layering import MODULES, ROOT

PATCHED = (
    (torch_internals.OutputGraph, intermediate_leaves._CHECK),
    (torch_internals.SetAttrBuiltinVariable, intermediate_leaves._ASSIGN),
    (torch_internals.TorchInGraphFunctionVariable, "_get_handlers"),
    (torch_internals.builder, "process_automatic_dynamic"),
    (torch_internals.builder, "_automatic_dynamic"),
    (torch_internals.InstructionTranslatorBase, graph_runner._LOOPS),
    (torch_internals.convert_frame, "CatchErrorsWrapper"),
    (torch_internals.convert_frame, "BackendInput"),
    (torch_internals.trace_rules, "MOD_INLINELIST"),
    (torch_internals.trace_rules, "get_mod_inlinelist"),
    (torch_internals.prims_common, "compute_elementwise_output_logical_to_physical_perm"),
    (torch_internals.fake_impls, "op_implementations_dict"),
    (torch.ops.aten.addmm.default, "py_kernels"),
    (torch.ops.aten.addmm.default, "_dispatch_cache"),
    (torch.distributions.Distribution, "_validate_args"),
    (torch.distributions.kl, "_KL_REGISTRY"),
    (torch.distributions.kl, "_KL_MEMOIZE"),
    (torch.UntypedStorage, "_new_with_weak_ptr"),
    (torch_internals.RandomVariable, "is_supported_random_obj"),
    *((torch_internals.SymNode, f"_{name}") for name in symbolic_arithmetic.OPERATIONS),
    *((torch_internals.SymNode, name) for name in ("expr", "maybe_as_int", "wrap_int")),
)
SETTINGS = (
    (torch_internals.dynamo_config, "skip_nnmodule_hook_guards"),
    (torch_internals.dynamo_config, "trace_autograd_ops"),
    (torch_internals.dynamo_config, "allow_rnn"),
    (torch_internals.dynamo_config, "accumulated_recompile_limit"),
    (torch_internals.dynamo_config, "fail_on_recompile_limit_hit"),
    (torch_internals.dynamo_config, "ignore_logging_functions"),
    (torch_internals.dynamo_config, "enable_dynamo_decompositions"),
    (torch_internals.inductor_config, "fallback_random"),
    (torch_internals.functorch_config, "backward_pass_autocast"),
    (torch_internals.functorch_config, "guess_tangent_strides_as_outputs"),
)


def private_modules(tree: ast.AST) -> Iterator[str]:
    """Yields what a file names of torch's private modules; single operators with private names are none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "torch" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            names = [f"torch.{node.attr}"] if node.attr != "_assert_async" else []
        else:
            continue
        yield from (name for name in names if name.startswith("torch.") and re.search(r"\._(?!_)", name))


@pytest.mark.parametrize("source", ["import torch._dynamo", "from torch import _C", "f = torch._C._is_tracing"])
def test_private_modules_are_found(source: str) -> None:
    assert list(private_modules(ast.parse(source)))


def test_one_file_reaches_into_private_modules() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in MODULES.values()
        if (names := list(private_modules(ast.parse(path.read_text()))))
    }
    assert set(found) == {"fxhybrid/torch_internals.py"}, found


def test_every_name_is_used() -> None:
    sources = "".join(path.read_text() for path in MODULES.values() if path.name != "torch_internals.py")
    assert [name for name in torch_internals.__all__ if name not in sources] == []


@pytest.mark.parametrize(
    ("owner", "name"), [*PATCHED, *SETTINGS], ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_replaced_while_tracing_exists(owner: object, name: str) -> None:
    assert hasattr(owner, name)
