"""Codecs between latents and pixels: the Wan VAE, and the tiny autoencoder, which is faster and less accurate."""
