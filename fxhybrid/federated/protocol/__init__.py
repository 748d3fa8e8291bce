"""Messages and transports."""
