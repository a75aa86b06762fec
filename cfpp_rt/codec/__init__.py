"""Latents to pixels and back: the Wan VAE, and the tiny autoencoder where its quality is enough."""
