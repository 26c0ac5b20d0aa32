"""`bitlm serve`: an OpenAI-compatible endpoint over the decoding engine, and a page that shows the bits."""
