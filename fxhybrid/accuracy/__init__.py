"""Gradient error: verification against eager, calibration, channel widths, drift."""
