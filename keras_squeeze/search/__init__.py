"""Finding the best balance of compression and accuracy."""
