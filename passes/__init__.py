"""Graph passes: each takes a graph or a stage's data and gives a new one; none knows a solver."""

if __name__ == "passes":
    raise ImportError("import fxhybrid.passes: this folder is reached through the package, not from the top level")
