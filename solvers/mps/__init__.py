"""The heuristic: memory saved per second, as a local search over plans."""
