"""The channel graph: which slices of which weights belong to one neuron."""
