"""Whether an edit fits a machine, and how its source is best kept: arithmetic before anything runs."""
