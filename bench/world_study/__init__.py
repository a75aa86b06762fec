"""The study of the built-in world: which distillation pipeline makes the best student."""
