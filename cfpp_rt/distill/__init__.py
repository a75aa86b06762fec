"""The distillation pipeline: from a diffusion model to a few-step autoregressive student, stage by stage."""
