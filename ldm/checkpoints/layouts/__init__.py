"""What others call our tensors: tables made from a model's config, one file a kind of model."""
