"""``labkit bench``: the engine, its kernels and their peers, measured in process against ceilings of the same run."""
