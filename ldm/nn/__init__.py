"""Building blocks of the networks: attention, blocks, embeddings."""
