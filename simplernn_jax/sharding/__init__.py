"""One mesh of devices, and what lies and runs where on it."""
