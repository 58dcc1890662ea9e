"""`ldm`: one file a verb."""
