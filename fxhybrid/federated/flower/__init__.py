"""The only place that knows Flower."""
