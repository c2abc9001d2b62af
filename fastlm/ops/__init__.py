"""The operations. Each file is in the same three parts: definition, backends, gradient."""
