"""The distillation pipeline: trains a diffusion model into a few-step autoregressive student, stage by stage."""
