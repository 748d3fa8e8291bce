"""Simulated devices, scenarios and experiments."""
