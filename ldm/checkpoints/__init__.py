"""Models and training state on disk: safetensors and JSON, committed whole or not at all."""
