"""Measurements of fxhybrid; ``python -m benchmarks`` lists them."""
