"""Federated training of one full model on devices that cannot all hold its unmodified training step."""
