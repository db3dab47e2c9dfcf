"""Token mixers: what a layer does along the time axis. One file each."""
