"""The operations a model is made of: one file per op, each a short PyTorch definition that runs anywhere."""
