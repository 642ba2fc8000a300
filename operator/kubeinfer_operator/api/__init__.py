"""The InferenceModel resource: its Python model, its rules and its schema."""
