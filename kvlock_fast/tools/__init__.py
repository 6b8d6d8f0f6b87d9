"""Installed libraries, and the compiled kernels' report."""
