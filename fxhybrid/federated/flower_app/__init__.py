"""The folder that `flwr run` takes; see docs/FEDERATED.md."""
