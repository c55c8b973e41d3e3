"""Knowledge of Keras's internals: the table of layers, selections, functional graphs."""
