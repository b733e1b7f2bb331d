"""Runs the model: KV blocks, input packing, sampling."""
