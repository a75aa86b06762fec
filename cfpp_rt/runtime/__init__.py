"""The rollout of a student and what it needs: forward passes, noise, CUDA graphs, streams and batches."""
