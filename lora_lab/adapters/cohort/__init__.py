"""Several adapters in one forward pass over one frozen base, each on its own rows."""
