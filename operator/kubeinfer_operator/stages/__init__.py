"""The stages of a reconcile, in the order of a model's life: accept, weights, runtime."""
