"""Callbacks for trainers, each of which imports its trainer when imported, and the backend of ``torch.compile``."""
