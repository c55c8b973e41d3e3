"""What a model holds and computes: reports, MACs, encodings, energy, plots."""
