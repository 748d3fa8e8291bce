"""Readings, traces and forecasts of memory."""
