"""The `keras-squeeze` command, one module for each group of subcommands."""
