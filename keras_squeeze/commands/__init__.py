"""The subcommands of `keras-squeeze`: `files` on finished models, `training` and `searching` on what trains."""
