"""The mesh of devices, shardings of arrays on it, and the pipeline."""
