"""The ledger task, its tokenizer, and the trainer of the small model that the lab ships."""
