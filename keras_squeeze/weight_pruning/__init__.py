"""Weight pruning: which weights become zero, and when."""
