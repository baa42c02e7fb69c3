"""The checkpoints that come with the package, each beside its model card."""
