"""Pure builders: from what is wanted to the manifests that say so. No builder asks a server or a clock."""
