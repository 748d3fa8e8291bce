"""From a module to its joint graph."""
