"""The server's app."""

from fxhybrid.federated.flower import make_server_app

app = make_server_app()
