"""How good a model is: exact match on the ledger task, perplexity, agreement with a reference, paired tests."""
