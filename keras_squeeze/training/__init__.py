"""What runs inside `fit`: the base of callbacks, masks as constraints, gradients, statistics of batch normalization."""
