"""The search for the best balance of size and accuracy, with Keras Tuner."""
