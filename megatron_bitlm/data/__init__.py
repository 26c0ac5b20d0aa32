"""From text to packed binary-code samples."""
