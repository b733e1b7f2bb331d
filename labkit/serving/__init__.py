"""The OpenAI-compatible HTTP server: the wire in front of the engine."""
