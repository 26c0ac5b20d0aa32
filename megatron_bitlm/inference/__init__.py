"""Block-wise generation."""
