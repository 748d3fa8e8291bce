"""Measurements of fxhybrid; ``python -m benchmarks`` lists them."""

import fxhybrid.api  # noqa: F401 - imported at first use otherwise, and then within what is timed
