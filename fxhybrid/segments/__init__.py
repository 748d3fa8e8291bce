"""Segments: steps of models that trace into several graphs only, planned as one."""
