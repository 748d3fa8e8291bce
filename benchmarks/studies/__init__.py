"""Measurements that decided one architecture decision record each."""
