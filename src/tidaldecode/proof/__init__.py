"""Proof that lossless decoding gives full attention's own output, on any model and real prompts."""
