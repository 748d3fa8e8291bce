"""The server's app."""

from fxhybrid.federated.flower.apps import make_server_app

app = make_server_app()
