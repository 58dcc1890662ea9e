"""The networks: autoencoder, text encoder, CLIP, U-Net. Each file reads alone."""
