"""Start of a script's process, its flags, configuration files and exit codes."""
