"""Sending traffic and writing down what happened to it. Knows only the wire, never the engine."""
