"""One OpenAI-compatible address for all models of a cluster."""
