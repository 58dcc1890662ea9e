"""Changes to a finished model from outside: low-rank adapters and learned words."""
