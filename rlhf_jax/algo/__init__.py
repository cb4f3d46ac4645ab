"""Every formula of the package, as pure functions of arrays."""
