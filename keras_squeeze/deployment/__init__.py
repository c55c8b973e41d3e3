"""What ships: files, and how fast they are."""
