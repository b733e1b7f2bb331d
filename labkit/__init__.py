"""An optimisation lab for LLM inference: instruments that notebooks put to use."""

__version__ = "0.1.0"
