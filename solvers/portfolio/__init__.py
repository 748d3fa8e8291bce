"""The known plans of one problem, and the portfolio of solvers."""
