"""Planning: which action for which tensor. Plain Python and numbers, no torch."""

if __name__ == "solvers":
    raise ImportError("import fxhybrid.solvers: this folder is reached through the package, not from the top level")
