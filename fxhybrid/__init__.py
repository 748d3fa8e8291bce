"""fxhybrid: train an unchanged PyTorch model inside a memory budget."""

__version__ = "0.1.0"
