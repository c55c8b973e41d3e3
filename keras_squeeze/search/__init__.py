"""The search for the best balance of compression and accuracy, with Keras Tuner."""
