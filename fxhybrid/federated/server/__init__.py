"""Rounds, planning for the fleet, aggregation, checkpoints."""
