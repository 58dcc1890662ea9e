"""Train and use a latent text-to-image model: autoencoder, text encoder, denoiser, samplers."""

__version__ = "0.1.0"
