"""Plain operators in place of those that AOTAutograd threads with effect tokens.

A token keeps operators without a result, such as checks that raise, in their order. A joint graph keeps the order of
its nodes anyway, and a token would be an input and an output that is no tensor of the model's.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxhybrid.torch_internals import with_effects


def drop_effect_tokens(module: fx.GraphModule) -> None:
    """Removes tokens from the inputs, calls and outputs of ``module``, in place."""
    graph = module.graph
    calls = graph.find_nodes(op="call_function", target=with_effects)
    given = [node.args[0] for node in calls if node.args[0].op == "placeholder"]
    made = [user for node in calls for user in node.users if user.args[1] == 0]
    output = graph.output_node()
    output.args = (tuple(node for node in output.args[0] if node not in made),)  # type: ignore[union-attr]
    for node in reversed(calls):
        _replace(node)
    for placeholder in dict.fromkeys(given):
        graph.erase_node(placeholder)
    if calls:
        module.recompile()


def _replace(node: fx.Node) -> None:
    """Puts the plain call of the operator in the place of ``node``, whose users are all ``getitem``."""
    op: Any = node.args[1]
    several = len(op._schema.returns) > 1
    results = node.meta["val"][1:]
    with node.graph.inserting_before(node):
        plain = node.graph.call_function(op, node.args[2:], node.kwargs)
    plain.meta = {**node.meta, "val": results if several else results[0]}
    for user in list(node.users):
        position: Any = user.args[1]
        if position == 0:
            user.graph.erase_node(user)
        elif several:
            user.args = (plain, position - 1)
        else:
            user.replace_all_uses_with(plain)
            user.graph.erase_node(user)
    node.graph.erase_node(node)
