"""A user's app on Flower: a model and data of its own, plans by fxhybrid, differential privacy by Flower."""
