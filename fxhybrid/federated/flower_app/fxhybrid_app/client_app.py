"""The devices' app."""

from fxhybrid.federated.flower import make_client_app

app = make_client_app()
