"""The integer program, and what is proven with it."""
