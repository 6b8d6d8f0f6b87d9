"""What is installed, and what the kernels compile to."""
