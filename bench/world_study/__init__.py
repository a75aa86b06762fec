"""The study of the built-in world: it compares the distillation pipelines by the students they make."""
