"""The lock on somebody's modules: which, when they are intercepted, and what is done to their outputs."""
