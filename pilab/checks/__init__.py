"""What a check can look at on a live bench: one noun per file, on the ports only."""
