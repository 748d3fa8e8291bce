"""Callbacks for trainers: ``hf_trainer`` and ``lightning_trainer`` each import their trainer when imported."""
