"""The causal Wan transformer and its weights."""
