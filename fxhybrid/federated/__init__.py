"""Federated training of one full model on devices that cannot all hold its unmodified training step."""

from fxhybrid.federated.memory.predictor import MemoryBudgetPredictor

__all__ = ["MemoryBudgetPredictor"]
