"""Documented name of what `kvlock_fast.loop.solver` says of solvers as tables."""

from kvlock_fast.loop.solver import solver_table

__all__ = ["solver_table"]
