"""Frozen foundation models and tasks: what a batch, a feature, a loss and a metric are."""
