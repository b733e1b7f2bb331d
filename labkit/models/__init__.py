"""Language models over a flat token stream, and their weights from Hugging Face checkpoints."""
