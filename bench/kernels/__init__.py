"""How fast each kernel is on a GPU, beside its peers and the machine's own ceilings."""
