"""What lives between calls: the cache store, and the hooks that hand it to a model."""
