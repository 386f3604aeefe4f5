"""Win rates, perplexity, diversity."""
