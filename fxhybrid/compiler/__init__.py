"""One call signature: its plans, active graphs and report."""
