"""Models and data that examples and benchmarks train."""
