"""Parameters under stable names and their configuration, for other programs and for this one."""
