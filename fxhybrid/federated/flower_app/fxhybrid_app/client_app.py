"""The devices' app."""

from fxhybrid.federated.flower.apps import make_client_app

app = make_client_app()
