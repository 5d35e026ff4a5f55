"""The graph that autograd builds."""

from typing import Any


def graph_nodes(root: Any) -> int:
    """Nodes of an autograd graph."""
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return len(seen)
