"""Pictures and captions in, WebDataset shards and batches out; knows nothing of models."""
