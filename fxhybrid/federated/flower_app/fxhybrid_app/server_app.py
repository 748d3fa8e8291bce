"""The server's app."""

from fxhybrid.federated.flower.driver_app import make_server_app

app = make_server_app()
