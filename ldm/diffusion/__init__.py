"""The mathematics of diffusion: noise levels, what a network predicts, guidance and samplers."""
