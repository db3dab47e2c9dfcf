"""A folder that `transformers` loads with ``trust_remote_code=True``."""
