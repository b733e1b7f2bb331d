"""Readings of the GPU, the host and the engine, taken at a fixed rate on the clock of the run."""
