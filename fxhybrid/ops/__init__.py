"""Custom operators whose backward pass holds less."""
