"""The devices' app."""

from fxhybrid.federated.flower.node_app import make_client_app

app = make_client_app()
