"""GPTQ: weights of 4 or 8 bits from a model and calibration text, in the checkpoint format that everyone reads."""
