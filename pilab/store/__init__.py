"""What is fetched and kept: the cache, Debian packages, kernels."""
